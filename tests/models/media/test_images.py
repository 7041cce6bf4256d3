"""Decoding of every kind of picture, and the reason given for every kind of refusal."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from models.media.images import decode_image
from models.media.pictures.errors import ImageError
from models.media.preprocessing import Preprocessing, eval_transform, normalize

RED, GREEN = (200, 30, 20), (20, 180, 40)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def two_tone(mode: str = "RGB") -> Image.Image:
    """A picture whose left half is red and right half green."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(GREEN, (20, 0, 40, 20))
    return image.convert(mode)


def pixel(data: bytes, at: tuple[int, int] = (5, 10)) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)[at[1], at[0]].astype(int)


@pytest.mark.parametrize(
    "data",
    [
        encode(two_tone(), "JPEG", quality=95),
        encode(two_tone(), "PNG"),
        encode(two_tone(), "WEBP", lossless=True),
        encode(two_tone("CMYK"), "JPEG", quality=95),
        encode(two_tone("RGBA"), "PNG"),
        encode(two_tone().quantize(8), "PNG"),
        encode(two_tone(), "BMP"),
        encode(two_tone(), "TIFF"),
    ],
    ids=["jpeg", "png", "webp", "cmyk", "rgba", "palette", "bmp", "tiff"],
)
def test_colours_come_out_right(data: bytes) -> None:
    assert np.abs(pixel(data) - RED).max() <= 12
    assert np.abs(pixel(data, (35, 10)) - GREEN).max() <= 12


def test_greyscale_and_16_bit() -> None:
    grey = Image.new("L", (8, 8), 128)
    assert (pixel(encode(grey, "PNG"), (2, 2)) == 128).all()
    deep = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert (pixel(encode(deep, "PNG"), (2, 2)) == 128).all()
    assert (pixel(encode(deep, "TIFF"), (2, 2)) == 128).all()


RAMP = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)


def test_deep_grey_is_scaled_by_its_types_range() -> None:
    expected = (RAMP * 255).round()
    deep = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
    pgm = b"P5 16 16 65535 " + (RAMP * 65535).round().astype(">u2").tobytes()
    for data in (encode(Image.fromarray(RAMP), "TIFF"), encode(deep, "TIFF"), pgm):
        levels = np.asarray(decode_image(data))[..., 0]
        assert np.abs(levels - expected).max() <= 1
        assert len(np.unique(levels)) == 256


@pytest.mark.parametrize(
    "values",
    [
        (RAMP.astype(np.float64) * (2**31 - 1)).astype(np.int32),
        (RAMP * 255).astype(np.int32),  # what its range is meant to be cannot be seen
        RAMP * 255,
        RAMP - 0.5,
        np.where(RAMP > 0.9, np.float32(np.nan), RAMP),
    ],
    ids=["int32", "small int32", "float to 255", "negative", "nan"],
)
def test_deep_grey_of_unknown_range_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(encode(Image.fromarray(values), "TIFF"))
    assert caught.value.reason == "unknown_range"


def test_transparency_is_laid_over_black() -> None:
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert (pixel(encode(image, "PNG"), (2, 2)) == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int) -> None:
    """A camera stores the sensor's picture and a flag. All eight flags must give the same scene."""
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = two_tone()
    for move in undo.get(orientation, []):
        stored = stored.transpose(move)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encode(stored, "JPEG", exif=exif, quality=95))
    assert image.size == (40, 20)
    assert np.abs(np.asarray(image)[10, 5].astype(int) - RED).max() <= 12


def png_header_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def corrupt_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - b for b in data[middle : middle + 40]) + data[middle + 40 :]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (b"", {"empty"}),
        (b"hello, I am a text file named .jpg" * 10, {"not_an_image"}),
        (encode(noise(), "JPEG")[:-900], {"truncated"}),
        (encode(noise(), "PNG")[:-900], {"truncated"}),
        (encode(noise(), "JPEG")[:12], {"not_an_image", "truncated", "decode_error"}),
        (corrupt_middle(encode(noise(), "PNG")), {"decode_error", "truncated"}),
        (png_header_claiming(60_000, 60_000), {"too_many_pixels"}),
        (png_header_claiming(12_000, 12_000), {"too_many_pixels"}),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "stub", "corrupt png", "huge bomb", "bomb"],
)
def test_bad_images_are_refused_with_a_reason(data: bytes, reasons: set[str]) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason in reasons
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.detail) == (caught.value.reason, caught.value.detail)


def test_draft_keeps_at_least_the_asked_size() -> None:
    data = encode(noise().resize((800, 600)), "JPEG")
    assert decode_image(data, draft=(100, 75)).size == (100, 75)
    assert decode_image(data).size == (800, 600)


PREP = Preprocessing(image_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def test_eval_transform_crops_the_centre() -> None:
    out = eval_transform(two_tone(), PREP)
    assert out.shape == (16, 16, 3)
    assert np.abs(out[8, 2].astype(int) - RED).max() <= 3  # x = 10 + 2.5 * 20 / 16 is still red
    assert np.abs(out[8, 13].astype(int) - GREEN).max() <= 3


def test_eval_transform_leaves_exact_size_alone() -> None:
    image = noise().resize((16, 16))
    np.testing.assert_array_equal(eval_transform(image, PREP), np.asarray(image))


def test_normalize_is_the_formula() -> None:
    import torch

    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (PREP.mean, PREP.std))
    torch.testing.assert_close(normalize(images, PREP.mean, PREP.std), (images / 255 - mean) / std)


def test_preprocessing_validates() -> None:
    with pytest.raises(ValueError, match="interpolation"):
        Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1), interpolation="cubic")


def test_documents_are_not_opened() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="not_an_image"):
        decode_image(eps)
