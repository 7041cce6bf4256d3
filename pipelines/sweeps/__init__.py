"""Sweeps: runs of a recipe as trials of Ray Tune. Imports training and the folders below it."""
