"""Finds the files of a source, and what they and their labels are. Imports entries and below."""
