"""Encoded pictures: their formats, their metadata, their colours."""
