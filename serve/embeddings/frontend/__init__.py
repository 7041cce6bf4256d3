"""The embeddings routes and what they do with a request. Imports streams and media."""
