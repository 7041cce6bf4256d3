"""The embeddings routes and how they answer a request. Imports streams and media."""
