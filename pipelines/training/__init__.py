"""The training loop and its parts. Imports evaluation, runs, loading and the folders below them."""
