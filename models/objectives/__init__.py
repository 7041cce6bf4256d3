"""Training objectives, one file each, and the registry of their names. Imports encoders and
views."""
