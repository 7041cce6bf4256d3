"""Data sets on disk: Parquet shards with their manifest, sets that grow, rows by their place. Imports config and runtime."""
