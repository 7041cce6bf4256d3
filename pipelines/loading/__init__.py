"""Training batches: read order, crops, clips and decoding, by Ray Data. Imports masks/."""
