"""The commands, one module each, above the folders of their parts. Imports models, never serve."""
