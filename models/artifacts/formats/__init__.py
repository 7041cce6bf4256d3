"""Encoder formats on disk, one module for each. Imports encoders, media and tensor_files."""
