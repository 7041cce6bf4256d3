"""Encoded bytes and crop boxes to uint8 pixels: the decoding half of loading.

Both places that decode (threads beside the device, Ray Data tasks) call `decode_rows`, so the
pixels are the same bit for bit.

Shape suffixes: B rows, C = 3 channels, T frames of a clip, H = W = S pixels of the crop, 4 = (left,
top, right, bottom).
"""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torchvision.io  # registers torch.ops.image
from PIL import Image
from torch import Tensor

from models.media.images import ImageError, decode_image
from models.media.pictures.colour import is_of_other_colours
from models.media.pictures.metadata import JPEG, PNG, has_transparent_colour
from models.media.videos import VideoError, decode_frames

U8 = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

UNCHANGED = torchvision.io.ImageReadMode.UNCHANGED.value
DRAFT_FROM = 4.0
"""Decode a JPEG at reduced scale when the crop is at least this many times larger than wanted. To
224 pixels on one core: 11.1 ms -> 6.7 ms from 2000x1600, 21 ms -> 10 ms from 3000x2400; no gain
below 4 times, as this way resizes with Pillow, which can place the box between reduced pixels."""


class DecodeError(ValueError):
    """A stored image or video that cannot be decoded: ingest should have refused it, or the shard is bad."""


def decode_rows(table: pa.Table, out: U8, pool: Executor | None = None, jobs: int = 1) -> None:
    """Decodes, crops, resizes (bicubic, antialiased) and flips the rows of a table.

    A clip is cropped and flipped as a whole; only the frames it needs are decoded.

    Args:
        table: columns `image` or `video`, `crop`, `flipped`, `height`, `width`, `sample_id`,
            `source_uri`, and for video `frames`.
        out: uint8 [B, C, H, W], or [B, C, T, H, W] of clips, written in place.
        pool: decodes parts of the rows at the same time; None decodes here.
        jobs: number of parts.

    Raises:
        DecodeError: names the sample.
    """
    is_video = "video" in table.column_names
    data, offsets = _encoded(table, "video" if is_video else "image")
    frames_BT = _flat(table, "frames").reshape(out.shape[0], -1) if is_video else None
    boxes_B4 = _flat(table, "crop").reshape(-1, 4).tolist()
    flipped_B = table.column("flipped").to_pylist()
    sizes_B2 = list(
        zip(table.column("height").to_pylist(), table.column("width").to_pylist(), strict=True)
    )

    def part(first: int, stop: int) -> None:
        for row in range(first, stop):
            encoded = data[offsets[row] : offsets[row + 1]]
            try:
                where = (sizes_B2[row], boxes_B4[row], flipped_B[row], out[row])
                if frames_BT is None:
                    _decode_crop(encoded, *where)
                else:
                    _decode_clip(encoded, frames_BT[row], *where)
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
    """All encoded bytes of the rows as one writable tensor, and the offsets of the rows in it."""
    column = table.column(name).cast(pa.large_binary()).combine_chunks()
    _, offset_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset :][: len(column) + 1]
    # A copy: torch refuses read-only memory, and Ray's is; about 1% of the cost of decoding.
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]].copy()
    return torch.from_numpy(data), (offsets - offsets[0]).tolist()


def _flat(table: pa.Table, name: str) -> Any:
    """The values of a list column, end to end."""
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
) -> None:
    """One image; `size` is the stored (height, width), which `box` refers to."""
    side = out_CHW.shape[-1]
    left, top, right, bottom = box
    shrink = min(right - left, bottom - top) / side
    if shrink >= DRAFT_FROM and _is_jpeg(encoded):
        crop_CHW = _reduced_crop(encoded, size, box, shrink, side)
    else:
        pixels_CHW = _decode_whole(encoded)
        _check_size(tuple(pixels_CHW.shape[1:]), size)
        crop_CHW = _resize(pixels_CHW[None, :, top:bottom, left:right], side)[0]
    # numpy's copy, not torch's: torch would start its own threads inside every decoder thread.
    np.copyto(out_CHW, crop_CHW[:, :, ::-1] if flipped else crop_CHW)


def _decode_clip(
    encoded: Tensor,
    frames_T: npt.NDArray[np.int32],
    size: tuple[int, int],
    box: Box,
    flipped: bool,
    out_CTHW: U8,
) -> None:
    """One clip: the frames of these numbers, all under the same box."""
    left, top, right, bottom = box
    pixels_THWC = decode_frames(encoded.numpy().tobytes(), frames_T.tolist())
    _check_size(tuple(pixels_THWC.shape[1:3]), size)
    pixels_TCHW = torch.from_numpy(pixels_THWC[:, top:bottom, left:right]).permute(0, 3, 1, 2)
    crop_TCHW = _resize(pixels_TCHW, out_CTHW.shape[-1])
    crop_CTHW = crop_TCHW.transpose(1, 0, 2, 3)
    np.copyto(out_CTHW, crop_CTHW[..., ::-1] if flipped else crop_CTHW)


def _check_size(found: tuple[int, ...], stored: tuple[int, int]) -> None:
    if found != stored:
        sizes = f"stored as {stored[0]}x{stored[1]}, decodes to {found[0]}x{found[1]}"
        raise ImageError("decode_error", sizes)


def _resize(crop_TCHW: Tensor, side: int) -> U8:
    if crop_TCHW.shape[2:] == (side, side):
        return crop_TCHW.numpy()
    # torch's uint8 kernel: over twice as fast as Pillow's (950 against 433 images/s from 500x400).
    resized: U8 = torch.nn.functional.interpolate(
        crop_TCHW, size=(side, side), mode="bicubic", antialias=True
    ).numpy()
    return resized


def _reduced_crop(encoded: Tensor, size: tuple[int, int], box: Box, shrink: float, side: int) -> U8:
    draft = (int(size[1] / shrink), int(size[0] / shrink))
    image = decode_image(encoded.numpy().tobytes(), draft=draft, max_pixels=None)
    ratio_w, ratio_h = image.width / size[1], image.height / size[0]
    if abs(ratio_w - ratio_h) > 2 / min(image.size):  # each side was rounded up
        _check_size((image.height, image.width), size)
    inside = (box[0] * ratio_w, box[1] * ratio_h, box[2] * ratio_w, box[3] * ratio_h)
    resized = image.resize((side, side), Image.Resampling.BICUBIC, box=inside)
    return np.asarray(resized).transpose(2, 0, 1)


def _is_jpeg(encoded: Tensor) -> bool:
    return len(encoded) > 2 and bytes(encoded[:2].numpy()) == b"\xff\xd8"


def _decode_whole(encoded: Tensor) -> Tensor:
    """Pixels [C, H, W], C = 1 or 3; the fast decoders for the common kinds, Pillow for the rest."""
    # The operators themselves: torchvision 0.29's wrappers warn of their move to torchcodec at every
    # call, which costs 10% of decoding a 32-pixel image.
    ops, upright = torch.ops.image, True
    data = encoded.numpy().tobytes()
    try:
        # Shards of before ingest saw to it may hold pictures that these decoders show otherwise.
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
        pass  # Pillow decides, and says why if it cannot either
    image = decode_image(data, max_pixels=None)  # how many it may have was for ingest to decide
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
