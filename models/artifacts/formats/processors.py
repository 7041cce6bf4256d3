"""Reads and writes the JSON files of transformers' image and video processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.image_size import height_width
from models.media.preprocessing import RESAMPLING, Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_processor(path: Path, image_size: int, resampling: str = "bicubic") -> Preprocessing:
    """Reads a preprocessor_config.json; missing statistics are ImageNet's.

    Args:
        path: the file, which need not exist.
        image_size: side of the encoder's input, pixels.
        resampling: default of this kind of processor, a row of `RESAMPLING`.
    """
    c = json.loads(path.read_text()) if path.is_file() else {}
    names = {int(v): k for k, v in RESAMPLING.items()}
    # ViT's processor gives height and width instead and squashes the picture; we crop the centre.
    short_side = c.get("size", {}).get("shortest_edge", image_size)
    return Preprocessing(
        image_size=image_size,
        mean=tuple(c.get("image_mean", IMAGENET_MEAN)),
        std=tuple(c.get("image_std", IMAGENET_STD)),
        interpolation=names[c.get("resample", int(RESAMPLING[resampling]))],
        crop_fraction=min(1.0, image_size / short_side),
    )


def processor_config(prep: Preprocessing) -> dict[str, Any]:
    """Returns BiT's processor, which crops the centre; ViT's would squash the picture."""
    height, width = height_width(prep.image_size)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) / prep.crop_fraction)},
        "resample": int(RESAMPLING[prep.interpolation]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(prep.mean),
        "image_std": list(prep.std),
    }


def video_processor_config(prep: Preprocessing) -> dict[str, Any]:
    """Returns LLaVA-OneVision's processor; V-JEPA 2's own always crops 7/8 of the short side."""
    config = processor_config(prep)
    del config["image_processor_type"]
    return config | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
