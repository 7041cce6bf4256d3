"""Transparent pictures of every kind over a background, and what ingest stores of them."""

from __future__ import annotations

import dataclasses
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.models.picture_files import chunk, encode, png
from models.media.images import decode_image
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.preparing.images import prepare_image
from pipelines.loading.decoding import _decode_whole

CFG = IngestConfig(source="/x", out="/y")
BACKGROUNDS = ("black", "white", "9,8,7", "#0a0b0c")
RGB_OF = {"black": (0, 0, 0), "white": (255,) * 3, "9,8,7": (9, 8, 7), "#0a0b0c": (10, 11, 12)}


def trns(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def one_transparent() -> dict[str, tuple[bytes, list[object]]]:
    """PNGs of one row by name, with their pixels; None is transparent."""
    cases: dict[str, tuple[bytes, list[object]]] = {}
    for bits in (2, 4, 8):
        top = 2**bits - 1
        values = [0, top // 2, top]
        pixels = [0 if v == 0 else round(255 * v / top) for v in values]
        grey = np.array([values])
        hidden = {0: [None, *pixels[1:]], top: [*pixels[:2], None]}
        for value, expected in hidden.items():
            name = f"grey {bits} bits, {value}"
            cases[name] = (png(grey, bits, 0, trns(value)), expected)
    for value, expected in ((0, [None, 255]), (1, [0, None])):
        cases[f"grey 1 bit, {value}"] = (png(np.array([[0, 1]]), 1, 0, trns(value)), expected)
    # Equal in the high byte, or in the 8 bits that are left of them: not the colour that is meant.
    grey16 = np.array([[257, 256, 258, 65535]])
    cases["grey 16 bits"] = (png(grey16, 16, 0, trns(257)), [None, 1, 1, 255])
    key = [[255, 0, 255], [255, 0, 254], [1, 2, 3]]
    cases["rgb"] = (png(np.array([key]), 8, 2, trns(*key[0])), [None, *key[1:]])
    deep = [[256, 512, 768], [256, 512, 769], [65535, 0, 0]]
    pixels16 = [None, [1, 2, 3], [255, 0, 0]]
    cases["rgb 16 bits"] = (png(np.array([deep]), 16, 2, trns(*deep[0])), pixels16)
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
    for bits in (2, 4, 8):
        one = palette + chunk(b"tRNS", b"\xff\0")  # fewer than there are colours
        data = png(np.array([[0, 1, 2]]), bits, 3, one)
        cases[f"palette {bits} bits"] = (data, [[255, 0, 0], None, [0, 0, 255]])
    cases["grey and alpha, 16 bits"] = (
        png(np.array([[[65535, 65535], [4660, 0]]]), 16, 4),
        [255, None],
    )
    levels = Image.fromarray(np.array([[0, 9, 200]], np.uint8))
    cases["gif"] = (encode(levels, "GIF", transparency=9), [0, None, 200])
    return cases


CASES = one_transparent()


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("name", CASES)
def test_one_transparent_colour_shows_the_background(name: str, background: str) -> None:
    data, pixels = CASES[name]
    behind = RGB_OF[background]
    expected = [behind if p is None else np.broadcast_to(np.array(p), 3) for p in pixels]
    seen = np.asarray(decode_image(data, background=behind))[0]
    np.testing.assert_array_equal(seen, expected)
    prepared = prepare_image(data, dataclasses.replace(CFG, background=background))
    stored = Image.open(io.BytesIO(prepared.data))
    assert stored.mode in ("RGB", "L")
    assert "transparency" not in stored.info
    np.testing.assert_array_equal(np.asarray(stored.convert("RGB"))[0], expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_partly_transparent_pixels_are_mixed(kind: str, mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    picture = Image.fromarray(values).convert(mode)
    *colours, alpha = (np.asarray(band, dtype=float) for band in picture.split())
    opacity = alpha[..., None] / 255
    lossless = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    for behind in RGB_OF.values():
        expected = np.stack(colours * (3 // len(colours)), -1) * opacity + behind * (1 - opacity)
        seen = np.asarray(decode_image(encode(picture, kind, **lossless), background=behind))
        assert np.abs(seen - expected).max() <= 1


@pytest.mark.parametrize("name", ["rgb", "grey 8 bits, 0", "grey 16 bits"])
def test_older_shards_that_still_hold_a_transparent_colour_load_as_they_are_decoded(
    name: str,
) -> None:
    data, _ = CASES[name]
    loaded = _decode_whole(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    np.testing.assert_array_equal(loaded.permute(1, 2, 0).numpy(), np.asarray(decode_image(data)))


def test_opaque_pictures_are_kept_whatever_the_background() -> None:
    data = encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG")
    assert prepare_image(data, dataclasses.replace(CFG, background="white")).data == data


@pytest.mark.parametrize("text", ["pink", "1,2", "1,2,256", "-1,0,0", "#12345", ""])
def test_invalid_backgrounds_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--background"):
        dataclasses.replace(CFG, background=text)
