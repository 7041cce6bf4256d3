"""Meta's released I-JEPA checkpoint files: training states whose `target_encoder` is the encoder.

A checkpoint is a dict with `encoder` and `target_encoder`, whose weights have timm's names behind
`module.`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from models.artifacts.formats.format import Format, Source, Stored
from models.artifacts.formats.key_maps import StateDict
from models.artifacts.formats.processors import IMAGENET_MEAN, IMAGENET_STD
from models.encoders.shape import PRESETS
from models.media.preprocessing import Preprocessing

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt")


def read_checkpoint(stored: Stored) -> Source:
    """Reads the target encoder of a released I-JEPA checkpoint file.

    Raises:
        ValueError: it is another kind of file, or no preset has its width and depth.
    """
    path, uri = stored.path, stored.uri
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"{uri}: expected a folder, or a file ending {CHECKPOINT_SUFFIXES}")
    state = from_meta(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    absent = {"pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} - state.keys()
    if absent:
        raise ValueError(f"{uri}: not a ViT of ours: missing {', '.join(sorted(absent))}")
    _, num_patches, width = state["pos_embed"].shape
    patch = state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    # The weights do not show the number of heads. V-JEPA 2's giant has another one than I-JEPA's.
    images = [p for name, p in PRESETS.items() if name.startswith("vit_")]
    heads = {(p.width, p.depth): p.heads for p in images}.get((width, depth))
    if heads is None:
        raise ValueError(f"{uri}: no preset is {width} wide and {depth} deep; heads unknown")
    size = math.isqrt(num_patches) * patch
    shape = {
        "image_size": size,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    prep = Preprocessing(image_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return Source(shape=shape, preprocessing=prep, state=state)


def from_meta(checkpoint: Mapping[str, Any]) -> StateDict:
    """Takes the target encoder, or else the encoder, from a released I-JEPA training state.

    Raises:
        ValueError: the checkpoint has neither.
    """
    for part in ("target_encoder", "encoder"):
        if isinstance(checkpoint.get(part), Mapping):
            return {k.removeprefix("module."): v for k, v in checkpoint[part].items()}
    found = sorted(map(str, checkpoint))[:8]
    raise ValueError(f"no target_encoder or encoder in this checkpoint, only {found}")


META_IJEPA = Format(
    name="Meta's I-JEPA checkpoint",
    recognises=lambda stored: stored.path.is_file(),
    read=read_checkpoint,
)
