"""A run on disk: its checkpoints, whether they are whole, and going back to one. Imports dataset and below."""
