"""Vision transformers for images and clips, and the predictor that is built from the same blocks.
Imports only torch and timm."""
