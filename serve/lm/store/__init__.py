"""Sessions on disk or S3: token logs, KV snapshots, ownership. Imports lm's types."""
