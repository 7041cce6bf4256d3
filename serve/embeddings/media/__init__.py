"""Fetches and decodes the images and videos of a request. Imports embeddings' types."""
