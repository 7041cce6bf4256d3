"""The encoder replica: pixels in, embeddings out, in dynamic batches. Imports embeddings' types."""
