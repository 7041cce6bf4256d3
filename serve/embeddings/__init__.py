"""The embeddings application: what its replicas and streams share. Imports ingress and replicas."""
