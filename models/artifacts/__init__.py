"""Encoders on disk: our artifact, and the formats of timm, transformers and Meta. Imports encoders and media."""
