"""The parts of ingest: what lies at a source (listing), and items with their labels out of it (reading)."""
