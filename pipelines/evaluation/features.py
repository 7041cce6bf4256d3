"""Frozen features of stored images or clips, decoded in threads and encoded in bounded batches.

Every probe, report and training run gets its features here, through the single evaluation transform
of `models.media.preprocessing`, so that their numbers compare.

Shape suffixes: B images or clips of one forward pass, N all of them, H and W pixels, C channels,
T tokens (patches), F frames of a clip, M patches of one time step, D feature width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.block_outputs import block_means
from models.encoders.input_batch import InputBatch, encode
from models.encoders.positions import embed_places, sincos_3d
from models.encoders.vit import VisionTransformer
from models.image_size import height_width
from models.media.preprocessing import (
    EncoderInput,
    Preprocessing,
    load_input,
    normalize,
    prepare,
)
from models.media.regions import Region
from models.media.videos import decode_frames
from pipelines.config.train import ModelConfig
from pipelines.dataset.rows import in_order
from pipelines.evaluation.near_duplicates import LUMA, THUMBNAIL
from pipelines.loading.clips import ClipSampler

Pooling: TypeAlias = Literal["mean", "patches"]
Featurizer: TypeAlias = Callable[[InputBatch], Tensor]
"""Maps images or clips to features with B rows."""

PIXEL_SIDE = 32
"""Raw pixels of images are shrunk to at most the number of pixels in a square of this side (3,072
numbers)."""
PLACE_WIDTH = 96  # width of the position code beside raw tubelets
CLIP_NUMBERS = 12_288
"""Raw pixels of a clip are shrunk to at most this many numbers."""


def preprocessing_of(model: ModelConfig) -> Preprocessing:
    """Returns the evaluation transform of a run's encoder."""
    return Preprocessing(
        image_size=model.image_size,
        mean=model.mean,
        std=model.std,
        fit=model.chosen_fit,
        exclude=model.exclude,
        patch_size=model.patch_size,
    )


def with_regions(prep: Preprocessing, exclude: tuple[Region, ...] | None) -> Preprocessing:
    """Returns the transform with other regions left out; None leaves its own."""
    return prep if exclude is None else dataclasses.replace(prep, exclude=exclude)


def load_clip(data: bytes, frames_F: np.ndarray, prep: Preprocessing) -> EncoderInput:
    """Decodes some frames of an encoded video under the transform."""
    pixels_FHWC = decode_frames(data, frames_F.tolist())
    inputs = [prepare(Image.fromarray(frame), prep) for frame in pixels_FHWC]
    return EncoderInput(np.stack([one.pixels for one in inputs]), inputs[0].kept)


def decode_batches(
    tables: pa.Table | Iterable[pa.Table],
    prep: Preprocessing,
    batch_size: int,
    sampler: ClipSampler | None = None,
) -> Iterator[InputBatch]:
    """Decodes the `image` or `video` column in threads, at most two batches ahead of the consumer.

    Args:
        tables: shard rows.
        prep: the evaluation transform.
        batch_size: number of images, or of frames of clips, in a batch.
        sampler: chooses the frames of a clip (the middle of every segment); None for images.

    Yields:
        Images or clips in row order, B constant except in the last batch.
    """
    count = batch_size if sampler is None else clips_per_batch(batch_size, sampler.frames)
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode") as pool:
        if sampler is None:
            # Ingest has already limited the size of stored images.
            decode = functools.partial(load_input, prep=prep, max_pixels=None)
            samples = in_order(pool, decode, _column(tables, "image"), 2 * count)
        else:
            clips = _clips(tables, sampler)
            samples = in_order(pool, lambda clip: load_clip(*clip, prep), clips, 2 * count)
        while batch := list(itertools.islice(samples, count)):
            yield InputBatch.of(batch, prep)


def clips_per_batch(frames: int, clip_frames: int) -> int:
    """Returns how many clips fit into a batch of so many frames, at least one."""
    return max(1, frames // clip_frames)


def decode_all(
    rows: pa.Table, prep: Preprocessing, sampler: ClipSampler | None = None
) -> InputBatch:
    """Decodes every row into memory as `decode_batches` does, for repeated extraction."""
    return InputBatch.join(list(decode_batches(rows, prep, 256, sampler)))


def encoder_features(
    encoder: nn.Module,
    prep: Preprocessing,
    *,
    pooling: Pooling = "mean",
    autocast: bool = False,
) -> Featurizer:
    """Wraps an encoder as a function of images or clips; see `models.encoders.input_batch.encode`.

    Args:
        encoder: the encoder.
        prep: the transform that the images or clips were decoded with.
        pooling: "mean" of the tokens, fp32 [B, D]; or "patches", all of them, fp32 [B, T, D], NaN
            where a picture has no token.
        autocast: run the forward in bfloat16.
    """

    def featurize(batch: InputBatch) -> Tensor:
        encoded = encode(encoder, batch, prep, autocast=autocast)
        return encoded.mean() if pooling == "mean" else encoded.in_grid()

    return featurize


def block_features(encoder: VisionTransformer, prep: Preprocessing) -> Featurizer:
    """Makes a featurizer of every block in one pass: their mean tokens side by side, [B, L * D]."""
    return lambda batch: block_means(encoder, batch, prep).flatten(1)


def single_frame(featurize: Featurizer) -> Featurizer:
    """Wraps a featurizer so that it sees only the middle frame of a clip, repeated as a still.

    The features then hold what a single picture tells and nothing that only motion tells.
    """

    def featurize_still(batch: InputBatch) -> Tensor:
        clips_BCFHW = batch.pixels
        middle = clips_BCFHW.shape[2] // 2
        still = clips_BCFHW[:, :, middle : middle + 1].expand_as(clips_BCFHW)
        return featurize(dataclasses.replace(batch, pixels=still))

    return featurize_still


def pixel_features(prep: Preprocessing) -> Featurizer:
    """Makes a featurizer that returns normalised pixels, shrunk where they are many.

    It returns [B, 3 * height * width] for images, at most `PIXEL_SIDE` squared pixels, and
    [B, 3 * F * height * width] for clips, at most `CLIP_NUMBERS` numbers. Patches that are left out
    are zero. Pictures with grids of their own are stretched to one size.
    """

    def featurize(batch: InputBatch) -> Tensor:
        x = normalize(batch.pixels, prep.mean, prep.std)
        side = PIXEL_SIDE
        if x.ndim == 5:
            side = min(side, max(1, math.isqrt(CLIP_NUMBERS // (x.shape[1] * x.shape[2]))))
        size = _small_size(height_width(prep.image_size), side)
        pictures = _shown(x, batch)
        if len({picture.shape for picture in pictures}) == 1:
            return _shrink(torch.stack(pictures), size)
        return torch.cat([_shrink(picture[None], size) for picture in pictures])

    return featurize


def thumbnail_features(batch: InputBatch) -> Tensor:
    """Returns grey thumbnails of images, or of the middle frames of clips, fp32 [B, cells].

    They show what the encoder is shown, for `near_duplicates.compare_thumbnails`. Patches that are
    left out are black.
    """
    cells = []
    for picture in _shown(batch.pixels, batch):
        frame_CHW = picture if picture.ndim == 3 else picture[:, picture.shape[1] // 2]
        grey_HW = torch.tensordot(torch.from_numpy(LUMA), frame_CHW.float(), dims=1)
        cells.append(F.adaptive_avg_pool2d(grey_HW[None], THUMBNAIL).flatten())
    return torch.stack(cells)


def _shown(x: Tensor, batch: InputBatch) -> list[Tensor]:
    """Returns each picture of `x`, the pixels of `batch` or numbers in their place, with zeros
    where patches are left out."""
    if batch.kept_BM is not None:
        mask_B1HW = _kept_pixels(batch.kept_BM, x.shape[-2:])
        x = x * (mask_B1HW if x.ndim == 4 else mask_B1HW[:, :, None])
    return dataclasses.replace(batch, pixels=x).pictures()


def _kept_pixels(kept_BM: Tensor, size: Sequence[int]) -> Tensor:
    """Returns 1 for pixels of kept patches, else 0, [B, 1, H, W], of pictures or strips."""
    height, width = size
    patch = math.isqrt(height * width // kept_BM.shape[1])
    mask_BHW = kept_BM.float().reshape(-1, height // patch, width // patch)
    return mask_BHW.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]


def _small_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Returns a size of the same aspect with no more pixels than a square of this side."""
    height, width = size
    if height * width <= side**2:
        return size
    aspect = math.sqrt(height / width)
    return max(1, int(side * aspect)), max(1, int(side / aspect))


def _shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes [B, C, H, W] or, frame by frame, [B, C, F, H, W], and flattens: [B, numbers]."""
    x_MCHW = x.movedim(2, 1).flatten(0, 1) if x.ndim == 5 else x
    if tuple(x.shape[-2:]) != size:
        x_MCHW = F.interpolate(x_MCHW, size, mode="bilinear", antialias=True)
    return x_MCHW.reshape(len(x), -1)


def tubelet_features(encoder: VisionTransformer, prep: Preprocessing) -> Featurizer:
    """Makes a featurizer of raw pixels for the attentive probe.

    It returns the P normalised pixels of every token and a code of the token's position,
    [B, T, P + `PLACE_WIDTH`]; NaN where a picture has no token.
    """
    places_ND = sincos_3d(PLACE_WIDTH, encoder.grid)

    def featurize(batch: InputBatch) -> Tensor:
        x_BTP = encoder.patch_embed.patchify(normalize(batch.pixels, prep.mean, prep.std))
        ids_1T = torch.arange(x_BTP.shape[1])[None]
        places = embed_places(places_ND, encoder.grid, ids_1T, batch.grids_B2)
        tokens_BTD = torch.cat([x_BTP, places.expand(len(x_BTP), -1, -1)], dim=2)
        if batch.kept_BM is None:
            return tokens_BTD
        tubes = x_BTP.shape[1] // batch.kept_BM.shape[1]
        return tokens_BTD.masked_fill(~batch.kept_BM.repeat(1, tubes)[..., None], math.nan)

    return featurize


def compute_features(
    featurizers: Mapping[str, Featurizer], batches: Iterable[InputBatch]
) -> dict[str, np.ndarray]:
    """Runs every featurizer over the same decoded batches, each sample decoded once.

    Returns:
        One array [N, ...] per featurizer, rows in order, of the dtype that the featurizer returns.

    Raises:
        ValueError: there are no samples.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in featurizers}
    with torch.inference_mode():
        for batch in batches:
            for name, featurize in featurizers.items():
                parts[name].append(featurize(batch).cpu().numpy())
    if not all(parts.values()):
        raise ValueError("no images to compute features of (are these rows labelled?)")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def extract_features(
    encoder: nn.Module,
    prep: Preprocessing,
    rows: pa.Table | Iterable[pa.Table] | InputBatch,
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
        rows: shard rows (encoded images or videos), or what `decode_all` returned.
        batch_size: number of images, or of frames of clips, in a forward pass.
        sampler: chooses the frames of a clip; None for images and for decoded pixels.

    Returns:
        fp32 [N, D], or [N, T, D] for pooling "patches", NaN where a picture has no token.
    """
    batches: Iterable[InputBatch]
    if isinstance(rows, InputBatch):
        frames = rows.pixels.shape[2] if rows.pixels.ndim == 5 else 1
        batches = rows.split(clips_per_batch(batch_size, frames))
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
