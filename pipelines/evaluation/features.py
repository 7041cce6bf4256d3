"""Frozen features of stored images or clips, decoded in threads and encoded in bounded batches.

Every probe, report and training run gets its features here, through the single evaluation transform
of `models.media.preprocessing`, so that their numbers compare.

Shape suffixes: B images or clips of one forward pass, N all of them, H and W pixels, C channels,
T tokens (patches), F frames of a clip, D feature width.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.positions import sincos_3d
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing, eval_transform, load_image, normalize
from models.media.videos import decode_frames
from pipelines.config.train import ModelConfig
from pipelines.dataset.rows import in_order
from pipelines.loading.clips import ClipSampler

Pooling: TypeAlias = Literal["mean", "patches"]
Featurizer: TypeAlias = Callable[[Tensor], Tensor]
"""Maps uint8 images [B, C, H, W] or clips [B, C, F, H, W] to features with B rows."""

PIXEL_SIDE = 32
"""Raw pixels of images are shrunk to at most this many pixels a side (3,072 numbers)."""
PLACE_WIDTH = 96  # width of the position code beside raw tubelets
CLIP_NUMBERS = 12_288
"""Raw pixels of a clip are shrunk to at most this many numbers."""


def preprocessing_of(model: ModelConfig) -> Preprocessing:
    """Returns the evaluation transform of a run's encoder."""
    return Preprocessing(image_size=model.image_size, mean=model.mean, std=model.std)


def load_clip(data: bytes, frames_F: np.ndarray, prep: Preprocessing) -> np.ndarray:
    """Decodes some frames of an encoded video under the transform: uint8 [F, H, W, C]."""
    pixels_FHWC = decode_frames(data, frames_F.tolist())
    return np.stack([eval_transform(Image.fromarray(frame), prep) for frame in pixels_FHWC])


def decode_batches(
    tables: pa.Table | Iterable[pa.Table],
    prep: Preprocessing,
    batch_size: int,
    sampler: ClipSampler | None = None,
) -> Iterator[Tensor]:
    """Decodes the `image` or `video` column in threads, at most two batches ahead of the consumer.

    Args:
        tables: shard rows.
        prep: the evaluation transform.
        batch_size: number of images, or of frames of clips, in a batch.
        sampler: chooses the frames of a clip (the middle of every segment); None for images.

    Yields:
        uint8 images [B, C, H, W] or clips [B, C, F, H, W] in row order, B constant except in the
        last one.
    """
    count = batch_size if sampler is None else clips_per_batch(batch_size, sampler.frames)
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode") as pool:
        if sampler is None:
            # Ingest has already limited the size of stored images.
            decode = functools.partial(load_image, prep=prep, max_pixels=None)
            samples = in_order(pool, decode, _column(tables, "image"), 2 * count)
        else:
            clips = _clips(tables, sampler)
            samples = in_order(pool, lambda clip: load_clip(*clip, prep), clips, 2 * count)
        while batch := list(itertools.islice(samples, count)):
            yield torch.from_numpy(np.stack(batch)).movedim(-1, 1)


def clips_per_batch(frames: int, clip_frames: int) -> int:
    """Returns how many clips fit into a batch of so many frames, at least one."""
    return max(1, frames // clip_frames)


def decode_all(rows: pa.Table, prep: Preprocessing, sampler: ClipSampler | None = None) -> Tensor:
    """Decodes every row into memory as `decode_batches` does, for repeated extraction."""
    return torch.cat(list(decode_batches(rows, prep, 256, sampler)))


def encoder_features(
    encoder: nn.Module,
    prep: Preprocessing,
    *,
    pooling: Pooling = "mean",
    autocast: bool = False,
) -> Featurizer:
    """Wraps an encoder as a function of uint8 images or clips.

    Args:
        encoder: maps normalised float images [B, C, H, W] or clips [B, C, F, H, W] to tokens
            [B, T, D]; runs on the device of its weights.
        pooling: "mean" of the tokens, fp32 [B, D]; or "patches", all of them, fp32 [B, T, D].
        autocast: run the forward in bfloat16.
    """
    device = next(encoder.parameters()).device

    def featurize(pixels: Tensor) -> Tensor:
        x = normalize(pixels.to(device, non_blocking=True), prep.mean, prep.std)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            tokens_BTD = encoder(x)
        tokens_BTD = tokens_BTD.float()
        features: Tensor = tokens_BTD.mean(dim=1) if pooling == "mean" else tokens_BTD
        return features

    return featurize


def single_frame(featurize: Featurizer) -> Featurizer:
    """Wraps a featurizer so that it sees only the middle frame of a clip, repeated as a still.

    The features then hold what a single picture tells and nothing that only motion tells.
    """

    def featurize_still(clips_BCFHW: Tensor) -> Tensor:
        middle = clips_BCFHW.shape[2] // 2
        return featurize(clips_BCFHW[:, :, middle : middle + 1].expand_as(clips_BCFHW))

    return featurize_still


def pixel_features(prep: Preprocessing) -> Featurizer:
    """Makes a featurizer that returns normalised pixels, shrunk where they are many.

    It returns [B, 3 * side * side] for images, with side at most `PIXEL_SIDE`, and
    [B, 3 * F * side * side] for clips, at most `CLIP_NUMBERS` numbers.
    """

    def featurize(pixels: Tensor) -> Tensor:
        x = normalize(pixels, prep.mean, prep.std)
        if x.ndim == 5:
            most = max(1, math.isqrt(CLIP_NUMBERS // (x.shape[1] * x.shape[2])))
            frames = x.movedim(2, 1).flatten(0, 1)
            return _shrink(frames, min(most, PIXEL_SIDE)).reshape(len(x), -1)
        return _shrink(x, PIXEL_SIDE).flatten(1)

    return featurize


def _shrink(x_BCHW: Tensor, side: int) -> Tensor:
    if x_BCHW.shape[-1] <= side:
        return x_BCHW
    return F.interpolate(x_BCHW, (side, side), mode="bilinear", antialias=True)


def tubelet_features(encoder: VisionTransformer, prep: Preprocessing) -> Featurizer:
    """Makes a featurizer of raw pixels for the attentive probe.

    It returns the P normalised pixels of every token and a code of the token's position,
    [B, T, P + `PLACE_WIDTH`].
    """
    places_ND = sincos_3d(PLACE_WIDTH, encoder.grid)

    def featurize(clips_BCFHW: Tensor) -> Tensor:
        x_BTP = encoder.patch_embed.patchify(normalize(clips_BCFHW, prep.mean, prep.std))
        places = places_ND[: x_BTP.shape[1]].expand(len(x_BTP), -1, -1)
        return torch.cat([x_BTP, places], dim=2)

    return featurize


def compute_features(
    featurizers: Mapping[str, Featurizer], batches: Iterable[Tensor]
) -> dict[str, np.ndarray]:
    """Runs every featurizer over the same decoded batches, each sample decoded once.

    Returns:
        One array [N, ...] per featurizer, rows in order, of the dtype that the featurizer returns.

    Raises:
        ValueError: there are no samples.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in featurizers}
    with torch.inference_mode():
        for pixels in batches:
            for name, featurize in featurizers.items():
                parts[name].append(featurize(pixels).cpu().numpy())
    if not all(parts.values()):
        raise ValueError("no images to compute features of (are these rows labelled?)")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def extract_features(
    encoder: nn.Module,
    prep: Preprocessing,
    rows: pa.Table | Iterable[pa.Table] | Tensor,
    *,
    batch_size: int = 256,
    pooling: Pooling = "mean",
    autocast: bool = False,
    sampler: ClipSampler | None = None,
) -> np.ndarray:
    """Computes frozen features; the encoder is in eval mode meanwhile.

    Args:
        encoder: as for `encoder_features`.
        prep: evaluation transform; its image size must be the encoder's.
        rows: shard rows (encoded images or videos), or pixels from `decode_all`.
        batch_size: number of images, or of frames of clips, in a forward pass.
        sampler: chooses the frames of a clip; None for images and for decoded pixels.

    Returns:
        fp32 [N, D], or [N, T, D] for pooling "patches".
    """
    batches: Iterable[Tensor]
    if isinstance(rows, Tensor):
        frames = rows.shape[2] if rows.ndim == 5 else 1
        batches = torch.split(rows, clips_per_batch(batch_size, frames))
    else:
        batches = decode_batches(rows, prep, batch_size, sampler)
    training = encoder.training
    encoder.eval()
    try:
        featurize = encoder_features(encoder, prep, pooling=pooling, autocast=autocast)
        return compute_features({"encoder": featurize}, batches)["encoder"]
    finally:
        encoder.train(training)


def _column(tables: pa.Table | Iterable[pa.Table], name: str) -> Iterator[bytes]:
    for table in [tables] if isinstance(tables, pa.Table) else tables:
        for value in table[name]:
            yield value.as_py()


def _clips(
    tables: pa.Table | Iterable[pa.Table], sampler: ClipSampler
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields encoded segments and the numbers of the frames of each clip."""
    for table in [tables] if isinstance(tables, pa.Table) else tables:
        frames_NF = sampler.middle(table["num_frames"].to_numpy(), table["fps"].to_numpy())
        yield from zip(_column(table, "video"), frames_NF, strict=True)
