"""Model replicas that batch, and how an ingress finds one of its model. Imports ingress."""
