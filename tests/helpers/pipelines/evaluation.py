"""What the tests of features and of the evaluation job share."""

from __future__ import annotations

import torch

from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing

PREP = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
Shards = tuple[str, str]
CLIP_SHAPE = {"image_size": 32, "patch_size": 8, "frames": 4, "tubelet": 2}


def small_encoder() -> VisionTransformer:
    """Makes an encoder of width 48 with random weights for 32-pixel images."""
    torch.manual_seed(0)
    return VisionTransformer(EncoderShape(image_size=32, patch_size=8, width=48, depth=2, heads=3))
