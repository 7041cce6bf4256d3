"""What every HTTP application of ours has around its routes."""
