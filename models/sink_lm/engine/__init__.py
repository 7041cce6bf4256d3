"""Many endless sessions in one decode batch. Imports network and checkpoints."""
