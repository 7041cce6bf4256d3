"""Masks as functions of the samples' keys; numpy only. Imports pipelines/config and models."""
