"""One module for each set that `pipelines.fetch` gets. Imports runtime and ingestion."""
