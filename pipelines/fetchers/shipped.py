"""The samples that ship with the source: part of CIFAR-10, and a few seconds of video.

No network is needed.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

from pipelines.fetchers.image_sets import CIFAR10_CLASSES

PIPELINES = Path(__file__).resolve().parent.parent
SAMPLE_TAR = PIPELINES / "sample" / "cifar10.tar.gz"
SAMPLE_VIDEO = PIPELINES / "sample_video"


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


def video_sample_folder(out: Path) -> Path:
    """Copies the shipped footage to `out` and returns it."""
    shutil.copytree(SAMPLE_VIDEO, out, dirs_exist_ok=True)
    return out
