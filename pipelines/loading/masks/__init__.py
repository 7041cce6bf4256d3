"""Crops and masks by the samples' keys; numpy only. Imports pipelines/config and models."""
