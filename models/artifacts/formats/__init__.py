"""Encoder formats on disk, one module each: how a format is recognised, read and written. Imports encoders and media."""
