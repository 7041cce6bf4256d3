"""Decodes images and clips, and crops them to uint8 pixels.

Both places that decode, threads in the trainer and Ray Data tasks, call `decode_rows`, so their
pixels are equal bit for bit.

A sample whose grid is its own (fit `whole`) is stored as a strip: its patches, in raster order,
side by side, and zeros for patches that it does not have. Cutting the strip into patches gives the
patches of the picture in their order.

Shape suffixes: B rows, C = 3 channels, T frames of a clip, H and W pixels of the crop, 4 = (left,
top, right, bottom), 2 = (rows, columns).
"""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from models.encoders.lazy_compiler import compiler_on_demand
from models.media.fit import inner_part
from models.media.images import BLACK, Rgb, decode_image
from models.media.pictures.colour import is_of_other_colours
from models.media.pictures.errors import ImageError
from models.media.pictures.metadata import JPEG, PNG, has_transparent_colour
from models.media.preprocessing import mean_colour
from models.media.video.containers import VideoError
from models.media.videos import decode_frames
from pipelines.config.train import ModelConfig, PretrainConfig

with compiler_on_demand():
    import torchvision.io  # registers torch.ops.image

U8 = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

UNCHANGED = torchvision.io.ImageReadMode.UNCHANGED.value
DRAFT_FROM = 4.0
"""A JPEG is decoded at reduced scale if the crop is at least this many times larger than the
output. To 224 pixels on one core this takes 6.7 instead of 11.1 ms from 2000x1600, and 10 instead
of 21 ms from 3000x2400. It gains nothing below 4 times, because it needs Pillow's slower resize,
which can place the box between reduced pixels."""


class DecodeError(ValueError):
    """A stored image or video does not decode: an error of ingest, or a damaged shard."""


def pixel_shape(cfg: PretrainConfig) -> tuple[int, ...]:
    """Returns the shape of one sample: [C, H, W], or [C, T, H, W] of a clip; or of its strip."""
    model = cfg.model
    size = model.height_width
    if model.chosen_fit == "whole":
        size = (model.patch_size, model.patch_size * model.grid.per_step)
    return (3, *size) if cfg.modality == "image" else (3, cfg.clip_frames, *size)


def decode_into(
    model: ModelConfig, table: pa.Table, out: U8, pool: Executor | None = None, jobs: int = 1
) -> None:
    """Decodes the rows as a run does; only with the fit `whole` are pictures stored as strips.

    Args:
        model: the run's.
        table: as for `decode_rows`.
        out: uint8 [B, *pixel_shape], written in place.
        pool: threads that decode parts of the rows in parallel; None decodes in this thread.
        jobs: number of parts.
    """
    if model.chosen_fit != "whole" and "grid" in table.column_names:
        table = table.drop_columns(["grid"])
    decode_rows(table, out, pool, jobs, outside=mean_colour(model.mean))


def decode_rows(
    table: pa.Table,
    out: U8,
    pool: Executor | None = None,
    jobs: int = 1,
    *,
    outside: Rgb = BLACK,
) -> None:
    """Decodes, crops, resizes (bicubic, antialiased) and flips the rows of a table.

    All frames of a clip get the same crop and flip. Frames that are not needed are not decoded.

    Args:
        table: columns `image` or `video`, `crop`, `flipped`, `height`, `width`, `sample_id`,
            `source_uri`, for video `frames`, and `grid` (rows and columns) if samples have grids of
            their own.
        out: uint8 [B, C, H, W], or [B, C, T, H, W] for clips, written in place. With `grid`, H is
            that of a patch and W that of the longest strip.
        pool: threads that decode parts of the rows in parallel; None decodes in this thread.
        jobs: number of parts.
        outside: the colour of what lies outside the picture.

    Raises:
        DecodeError: a row does not decode; the sample is named.
    """
    is_video = "video" in table.column_names
    data, offsets = _encoded(table, "video" if is_video else "image")
    frames_BT = _flat(table, "frames").reshape(out.shape[0], -1) if is_video else None
    boxes_B4 = _flat(table, "crop").reshape(-1, 4).tolist()
    flipped_B = table.column("flipped").to_pylist()
    grids_B2 = _flat(table, "grid").reshape(-1, 2) if "grid" in table.column_names else None
    sizes_B2 = list(
        zip(table.column("height").to_pylist(), table.column("width").to_pylist(), strict=True)
    )

    def part(first: int, stop: int) -> None:
        for row in range(first, stop):
            encoded = data[offsets[row] : offsets[row + 1]]
            try:
                pixels = out[row] if grids_B2 is None else _strip_picture(out[row], grids_B2[row])
                where = (sizes_B2[row], boxes_B4[row], flipped_B[row], pixels, outside)
                if frames_BT is None:
                    _decode_crop(encoded, *where)
                else:
                    _decode_clip(encoded, frames_BT[row], *where)
                if grids_B2 is not None:
                    _write_strip(out[row], pixels)
            except (ImageError, VideoError) as error:
                raise DecodeError(f"{_name(table, row)}: {error}") from error

    if pool is None or jobs == 1:
        part(0, len(boxes_B4))
        return
    edges = np.linspace(0, len(boxes_B4), jobs + 1).astype(int).tolist()
    parts = [pool.submit(part, *edge) for edge in itertools.pairwise(edges)]
    for done in parts:
        done.result()


def _encoded(table: pa.Table, name: str) -> tuple[Tensor, list[int]]:
    """Returns all encoded bytes as one writable tensor, and the offset of each row in it."""
    column = table.column(name).cast(pa.large_binary()).combine_chunks()
    _, offset_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset :][: len(column) + 1]
    # Torch needs writable memory and Ray's is read-only. The copy costs about 1% of decoding.
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]].copy()
    return torch.from_numpy(data), (offsets - offsets[0]).tolist()


def _flat(table: pa.Table, name: str) -> Any:
    """Returns the values of a list column, flattened."""
    return table.column(name).combine_chunks().flatten().to_numpy()


def _name(table: pa.Table, row: int) -> str:
    sample_id = table.column("sample_id")[row].as_py().hex()
    return f"sample {sample_id} ({table.column('source_uri')[row].as_py()})"


def _decode_crop(
    encoded: Tensor,
    size: tuple[int, int],
    box: Box,
    flipped: bool,
    out_CHW: U8,
    outside: Rgb,
) -> None:
    """Decodes one image; `box` is in pixels of the stored (height, width) `size`."""
    box, out_CHW = _inside(size, box, out_CHW, outside, flipped)
    height, width = out_CHW.shape[-2:]
    left, top, right, bottom = box
    shrink = min((right - left) / width, (bottom - top) / height)
    if shrink >= DRAFT_FROM and _is_jpeg(encoded):
        crop_CHW = _reduced_crop(encoded, size, box, shrink, (height, width))
    else:
        pixels_CHW = _decode_whole(encoded)
        _check_size(tuple(pixels_CHW.shape[1:]), size)
        crop_CHW = _resize(pixels_CHW[None, :, top:bottom, left:right], (height, width))[0]
    _write(crop_CHW, out_CHW, flipped)


def _decode_clip(
    encoded: Tensor,
    frames_T: npt.NDArray[np.int32],
    size: tuple[int, int],
    box: Box,
    flipped: bool,
    out_CTHW: U8,
    outside: Rgb,
) -> None:
    """Decodes the given frames of a clip, all with the same box."""
    box, out_CTHW = _inside(size, box, out_CTHW, outside, flipped)
    left, top, right, bottom = box
    pixels_THWC = decode_frames(encoded.numpy().tobytes(), frames_T.tolist())
    _check_size(tuple(pixels_THWC.shape[1:3]), size)
    pixels_TCHW = torch.from_numpy(pixels_THWC[:, top:bottom, left:right]).permute(0, 3, 1, 2)
    crop_TCHW = _resize(pixels_TCHW, out_CTHW.shape[-2:])
    _write(crop_TCHW.transpose(1, 0, 2, 3), out_CTHW, flipped)


def _write(crop: U8, out: U8, flipped: bool) -> None:
    """Copies [..., H, W], mirrored if wanted."""
    # Copied by numpy, because torch would start its own threads inside every decoder thread.
    if not flipped or out.shape[-1] % 8 or not out.flags.c_contiguous:
        np.copyto(out, crop[..., ::-1] if flipped else crop)
        return
    np.copyto(out, crop)
    # Eight pixels at a time: half the time of one by one.
    words = out.view(np.uint64)
    words[...] = words[..., ::-1].byteswap()


def _inside(
    size: tuple[int, int], box: Box, out: U8, outside: Rgb, flipped: bool
) -> tuple[Box, U8]:
    """Paints what of a box lies outside the picture; returns the rest of the box and its place.

    Args:
        size: height and width of the picture.
        box: may reach beyond the picture.
        out: uint8 [C, ..., H, W], which shows the box, mirrored if `flipped`.
        outside: the colour.
        flipped: whether it is mirrored.

    Returns:
        The part of the box inside the picture, and the view of `out` that shows this part.
    """
    inside, rows, columns = inner_part(box, size, out.shape[-2:])
    if inside == box:
        return box, out
    out[...] = np.array(outside, np.uint8).reshape(-1, *(1,) * (out.ndim - 1))
    if flipped:
        columns = slice(out.shape[-1] - columns.stop, out.shape[-1] - columns.start)
    return inside, out[..., rows, columns]


def _strip_picture(strip: U8, grid_2: npt.NDArray[np.int64]) -> U8:
    """Returns an empty picture whose patches fill part of a strip."""
    patch = strip.shape[-2]
    return np.empty((*strip.shape[:-2], *(int(side) * patch for side in grid_2)), np.uint8)


def _write_strip(strip: U8, picture: U8) -> None:
    """Writes the patches of a picture side by side, in raster order, and zeros after them."""
    *lead, height, width = picture.shape
    patch = strip.shape[-2]
    patches = picture.reshape(*lead, height // patch, patch, width // patch, patch)
    side_by_side = np.moveaxis(patches, -3, -4).reshape(*lead, patch, -1)
    strip[..., : side_by_side.shape[-1]] = side_by_side
    strip[..., side_by_side.shape[-1] :] = 0


def _check_size(found: tuple[int, ...], stored: tuple[int, int]) -> None:
    if found != stored:
        sizes = f"stored as {stored[0]}x{stored[1]}, decodes to {found[0]}x{found[1]}"
        raise ImageError("decode_error", sizes)


def _resize(crop_TCHW: Tensor, size: tuple[int, ...]) -> U8:
    if crop_TCHW.shape[2:] == size:
        return crop_TCHW.numpy()
    if len(crop_TCHW) == 1 and crop_TCHW.shape[1] == 3 and crop_TCHW.stride(1) == 1:
        # One picture with interleaved channels: with the stride of its only picture left as it is,
        # torch does not see that they are, and spends a tenth of resizing on separating them.
        strides = (crop_TCHW.shape[2] * crop_TCHW.stride(2), *crop_TCHW.stride()[1:])
        crop_TCHW = crop_TCHW.as_strided(crop_TCHW.shape, strides, crop_TCHW.storage_offset())
    # Torch's uint8 kernel is over twice as fast as Pillow's (950 against 433 images/s from
    # 500x400).
    resized: U8 = torch.nn.functional.interpolate(
        crop_TCHW, size=size, mode="bicubic", antialias=True
    ).numpy()
    return resized


def _reduced_crop(
    encoded: Tensor, size: tuple[int, int], box: Box, shrink: float, made: tuple[int, int]
) -> U8:
    """Decodes at reduced scale and resizes the box to `made`, height and width."""
    draft = (int(size[1] / shrink), int(size[0] / shrink))
    image = decode_image(encoded.numpy().tobytes(), draft=draft, max_pixels=None)
    ratio_w, ratio_h = image.width / size[1], image.height / size[0]
    if abs(ratio_w - ratio_h) > 2 / min(image.size):  # each side was rounded up
        _check_size((image.height, image.width), size)
    inside = (box[0] * ratio_w, box[1] * ratio_h, box[2] * ratio_w, box[3] * ratio_h)
    resized = image.resize(made[::-1], Image.Resampling.BICUBIC, box=inside)
    return np.asarray(resized).transpose(2, 0, 1)


def _is_jpeg(encoded: Tensor) -> bool:
    return len(encoded) > 2 and bytes(encoded[:2].numpy()) == b"\xff\xd8"


def _decode_whole(encoded: Tensor) -> Tensor:
    """Decodes to [C, H, W], C = 1 or 3: common kinds by torchvision, the rest by Pillow."""
    # The operators are called directly: at every call torchvision 0.29's wrappers warn of their
    # move to torchcodec, which costs 10% of decoding a 32-pixel image.
    ops, upright = torch.ops.image, True
    data = encoded.numpy().tobytes()
    try:
        # Older shards may hold pictures whose colours these decoders would get wrong.
        if data.startswith(JPEG) and not is_of_other_colours(data):
            pixels: Tensor = ops.decode_jpeg(encoded, UNCHANGED, upright)
            if pixels.shape[0] in (1, 3):
                return pixels
        # 8 bits a channel, grey or RGB: no palette, no transparency.
        plain = data.startswith(PNG) and data[24:26] in (b"\x08\x00", b"\x08\x02")
        if plain and not has_transparent_colour(data) and not is_of_other_colours(data):
            pixels = ops.decode_png(encoded, UNCHANGED, upright)
            return pixels
    except RuntimeError:
        pass  # Pillow tries next, and its error says why it fails
    image = decode_image(data, max_pixels=None)  # ingest has checked the number of pixels
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
