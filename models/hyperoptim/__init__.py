"""Optimizers that descend their hyperparameters too (docs/optimizers.md). Imports torch only."""
