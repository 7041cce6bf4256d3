"""A source's files by name and address, and how reading one of them fails. Imports config and runtime."""
