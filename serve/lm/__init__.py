"""The language model's application: what its ingress and its replicas share. Imports ingress."""
