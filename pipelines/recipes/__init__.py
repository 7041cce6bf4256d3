"""Named complete runs for images and for video, and their registry. Imports config."""
