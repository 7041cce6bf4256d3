"""Many endless sessions in one decode batch: continuous batching, sampling, stops. Imports network and checkpoints."""
