"""The embeddings application: what its ingress, embedder and streams share. Imports ingress."""
