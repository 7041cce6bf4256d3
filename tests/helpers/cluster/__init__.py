"""Hosts made of Linux namespaces, a Ray cluster on them, and ways to break both."""
