"""Training objectives, one per file, and the registry of their names. Imports encoders, media and
views."""
