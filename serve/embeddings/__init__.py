"""The embeddings application: settings, request and reply types. Imports ingress."""
