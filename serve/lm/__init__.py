"""The language model's application: settings, and what passes between ingress and replicas. Imports ingress."""
