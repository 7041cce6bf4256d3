"""The planning routes and how they answer a request. Imports planning's types and media."""
