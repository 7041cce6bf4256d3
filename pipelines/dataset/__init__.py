"""Data sets on disk: Parquet shards, growing sets, and their rows. Imports config and runtime."""
