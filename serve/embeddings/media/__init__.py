"""Images and videos of a request, fetched and decoded in processes of their own. Imports embeddings' types."""
