"""Runs of a sweep as trials of Ray Tune: what varies, how trials run, what they found. Imports training and below."""
