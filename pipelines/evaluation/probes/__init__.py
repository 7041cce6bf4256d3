"""Probes of frozen features, a file each, and the registry that lists them. Imports evaluation and below."""
