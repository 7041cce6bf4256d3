"""Encoders on disk: saving and loading, in our format and others'. Imports encoders and media."""
