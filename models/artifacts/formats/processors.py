"""Reads and writes the JSON files of transformers' image and video processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.image_size import ImageSize, height_width
from models.media.preprocessing import RESAMPLING, Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_processor(path: Path, image_size: ImageSize, resampling: str = "bicubic") -> Preprocessing:
    """Reads a preprocessor_config.json; missing statistics are ImageNet's.

    Args:
        path: the file, which need not exist.
        image_size: the encoder's, pixels.
        resampling: default of this kind of processor, a row of `RESAMPLING`.
    """
    c = json.loads(path.read_text()) if path.is_file() else {}
    names = {int(v): k for k, v in RESAMPLING.items()}
    shorter = min(height_width(image_size))
    # ViT's processor gives height and width too and squashes the picture; the published encoders
    # were evaluated on the cropped centre, and so we crop there.
    squash = "height" in c.get("size", {}) and c.get("do_center_crop") is False
    return Preprocessing(
        image_size=image_size,
        mean=tuple(c.get("image_mean", IMAGENET_MEAN)),
        std=tuple(c.get("image_std", IMAGENET_STD)),
        interpolation=names[c.get("resample", int(RESAMPLING[resampling]))],
        crop_fraction=min(1.0, shorter / c.get("size", {}).get("shortest_edge", shorter)),
        fit="squash" if squash else "crop",
    )


def no_processor(prep: Preprocessing) -> str | None:
    """Returns why no processor of transformers does what a transform does; None if one does."""
    height, width = height_width(prep.image_size)
    if prep.exclude:
        return "no processor of transformers leaves out regions"
    if prep.fit in ("pad", "whole"):
        return f"no processor of transformers does what fit {prep.fit} does"
    if prep.fit == "crop" and height != width:
        return "no processor of transformers crops pictures of any aspect to a rectangle"
    if prep.fit == "squash" and prep.crop_fraction != 1:
        return "no processor of transformers crops what it has squashed"
    return None


def processor_config(prep: Preprocessing) -> dict[str, Any]:
    """Returns BiT's processor, which crops the centre or squashes; ViT's would always squash.

    Args:
        prep: a transform for which `no_processor` gives no reason.
    """
    height, width = height_width(prep.image_size)
    exact = {"height": height, "width": width}
    squash = prep.fit == "squash"
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": exact if squash else {"shortest_edge": round(height / prep.crop_fraction)},
        "resample": int(RESAMPLING[prep.interpolation]),
        "do_center_crop": not squash,
        "crop_size": exact,
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


def without_processor(file: str, prep: Preprocessing) -> list[str]:
    """Returns what to say about a processor's file that is not written; [] if it is written."""
    reason = no_processor(prep)
    return [] if reason is None else [f"transformers/ has no {file}: {reason}"]
