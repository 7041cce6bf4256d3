"""The shape of an encoder and the named presets.

To add an argument to the encoder, add a field to `EncoderShape`, use it in `vit.py`, and add a flag
to `pipelines.config.train.ModelConfig`. Checkpoints, artifacts and untrained baselines then have it
too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.image_size import Grid, ImageSize, as_image_size, height_width, size_text


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """Everything that determines the shapes of an encoder's weights and of its input.

    Artifacts store these fields as JSON in this order. Fields with a default may be missing there.

    Raises:
        ValueError: `patch_size` does not divide `image_size`, or `tubelet` does not divide
            `frames`.
    """

    image_size: ImageSize
    """Pixels on a side of a square input, or (height, width)."""
    patch_size: int
    """Pixels on a side of a patch; divides height and width."""
    width: int
    """Token dimensions."""
    depth: int
    """Number of transformer blocks."""
    heads: int
    """Number of attention heads; divides `width`."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP as a multiple of `width`."""
    patch_std: float = 0.02
    """Standard deviation of the initial patch embedding where `init` is `normal`."""
    frames: int = 1
    """Frames of the longest clip; 1 for images."""
    tubelet: int = 1
    """Frames in a token; divides `frames`."""
    positions: str = "sincos"
    """Entry of `models.encoders.positions.POSITIONS`."""
    init: str = "normal"
    """Initial weights: `normal` or `fan_in`, see `models.encoders.blocks.init_weights`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_image_size(self.image_size))
        if any(side % self.patch_size for side in height_width(self.image_size)):
            size = size_text(self.image_size)
            raise ValueError(f"patch size {self.patch_size} does not divide image size {size}")
        if self.frames % self.tubelet:
            raise ValueError(
                f"--model.tubelet: {self.tubelet} frames do not divide a clip of {self.frames}"
            )

    @classmethod
    def from_preset(cls, preset: str, **sizes: Any) -> EncoderShape:
        """Takes width, depth, heads and MLP ratio from a preset and all other fields from `sizes`.

        Raises:
            ValueError: the preset does not exist, or the sizes are incompatible.
        """
        p = find_preset(preset)
        return cls(width=p.width, depth=p.depth, heads=p.heads, mlp_ratio=p.mlp_ratio, **sizes)

    @classmethod
    def from_settings(cls, model: Mapping[str, Any]) -> EncoderShape:
        """Reads the shape from a run's model settings, whose key `encoder` names the preset.

        Other keys are ignored. Runs made before video was supported lack some fields, which get
        their defaults.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return cls.from_preset(model["encoder"], **{k: v for k, v in model.items() if k in names})

    @property
    def grid(self) -> Grid:
        """The grid of tokens of the longest clip or of an image."""
        height, width = height_width(self.image_size)
        return Grid(height // self.patch_size, width // self.patch_size, self.tubes)

    @property
    def tubes(self) -> int:
        """Time steps of the token grid; 1 for images."""
        return self.frames // self.tubelet


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Size of an encoder and of the predictor that goes with it."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    predictor_width: int
    predictor_depth: int
    predictor_heads: int


# Encoder shapes are those of I-JEPA, appendix A.1 (s to g), and of DeiT (ti). Predictors are as in
# the paper for l, h and g: 384 wide and 12 blocks deep (16 for g). The one for b has 6 blocks. For
# ti and s they have half the encoder's width, because the paper's 384 would cost more than the
# encoder itself. The number of heads keeps the head size at 32, which attention kernels prefer; the
# original's head size of 24 for h is slow.
PRESETS = {
    "vit_ti": Preset(
        width=192, depth=12, heads=3, predictor_width=96, predictor_depth=6, predictor_heads=3
    ),
    "vit_s": Preset(
        width=384, depth=12, heads=6, predictor_width=192, predictor_depth=6, predictor_heads=6
    ),
    "vit_b": Preset(
        width=768, depth=12, heads=12, predictor_width=384, predictor_depth=6, predictor_heads=12
    ),
    "vit_l": Preset(
        width=1024, depth=24, heads=16, predictor_width=384, predictor_depth=12, predictor_heads=12
    ),
    "vit_h": Preset(
        width=1280, depth=32, heads=16, predictor_width=384, predictor_depth=12, predictor_heads=12
    ),
    "vit_g": Preset(
        width=1408,
        depth=40,
        heads=16,
        mlp_ratio=48 / 11,
        predictor_width=384,
        predictor_depth=16,
        predictor_heads=12,
    ),
    # For 32-pixel images on a few CPU cores.
    "vit_micro32": Preset(
        width=96, depth=4, heads=3, predictor_width=48, predictor_depth=2, predictor_heads=3
    ),
    "vit_tiny32": Preset(
        width=128, depth=4, heads=4, predictor_width=64, predictor_depth=2, predictor_heads=2
    ),
    "vit_small32": Preset(
        width=192, depth=6, heads=6, predictor_width=96, predictor_depth=4, predictor_heads=3
    ),
    # For clips. The shapes are V-JEPA 2's (arXiv 2506.09985, section 2): its giant model has 22
    # heads, and every predictor has 12 blocks.
    "video_b": Preset(
        width=768, depth=12, heads=12, predictor_width=384, predictor_depth=12, predictor_heads=12
    ),
    "video_l": Preset(
        width=1024, depth=24, heads=16, predictor_width=384, predictor_depth=12, predictor_heads=12
    ),
    "video_h": Preset(
        width=1280, depth=32, heads=16, predictor_width=384, predictor_depth=12, predictor_heads=12
    ),
    "video_g": Preset(
        width=1408,
        depth=40,
        heads=22,
        mlp_ratio=48 / 11,
        predictor_width=384,
        predictor_depth=12,
        predictor_heads=12,
    ),
    # For clips of 32 or 64 pixels on a few CPU cores. Head sizes of 24 and 32 suit 3-D RoPE.
    "video_micro": Preset(
        width=96, depth=4, heads=3, predictor_width=48, predictor_depth=2, predictor_heads=2
    ),
    "video_tiny": Preset(
        width=128, depth=4, heads=4, predictor_width=64, predictor_depth=2, predictor_heads=2
    ),
    "video_small": Preset(
        width=192, depth=6, heads=6, predictor_width=96, predictor_depth=4, predictor_heads=4
    ),
}


def find_preset(name: str) -> Preset:
    """Returns an entry of `PRESETS`.

    Raises:
        ValueError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"--model.encoder: no preset {name!r}; one of {', '.join(PRESETS)}")
    return PRESETS[name]
