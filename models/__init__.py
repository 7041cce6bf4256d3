"""Networks and objectives in plain PyTorch and timm; imports nothing else of ours."""
