"""Probes of frozen features and the registry that lists them. Imports evaluation and below."""
