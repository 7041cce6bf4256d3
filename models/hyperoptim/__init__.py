"""Optimizers whose hyperparameters are themselves descended (docs/optimizers.md). Imports torch only."""
