"""Vision transformers for images and clips, and the predictor that shares their blocks. Imports
torch and timm only."""
