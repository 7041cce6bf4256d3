"""The embedder: the forward pass in dynamic batches. Imports embeddings' types."""
