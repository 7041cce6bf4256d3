"""A run on disk: its folder, its checkpoints, resuming. Imports dataset and the folders below."""
