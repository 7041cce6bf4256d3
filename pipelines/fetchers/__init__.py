"""Real data sets and models by package clients, and games recorded as video. Imports ingestion and below."""
