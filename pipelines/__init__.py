"""The way of the data, one job a file.

sources -> ingest -> shards        raw images become validated Parquet shards and a manifest
plan -> masking -> loading         a pure function of (manifest, seed, epoch) becomes batches
pretrain -> trainer -> checkpoints Ray Train runs the objective and watches for collapse
probes -> evaluate -> report       what the encoder learned, beside random-init and raw pixels
export -> embed                    the artifact, and a whole data set through it
demo                               all of it on the shipped sample, ending in an HTTP request
"""
