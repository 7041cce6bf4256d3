"""The parts of ingest: what lies at a source, and what becomes of it."""
