"""Features, baselines and ranks that tell what an encoder learned. Imports runs and below."""
