"""Pictures and artifacts for the rig, on its S3."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helpers.cluster.s3 import BUCKET, RigS3
from helpers.serve.embeddings import save_tiny_artifact

CLASSES, A_CLASS = 10, 32
SAMPLES = CLASSES * A_CLASS
BATCH = 32
"""Images a step of the recipe `debug`."""


def picture(label: int, index: int) -> bytes:
    """A PNG of 32 pixels: noise around a colour of its class, the same in every run."""
    rng = np.random.default_rng((label, index))
    colour = np.random.default_rng(label).integers(40, 216, 3)
    pixels = np.clip(colour + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def upload_pictures(s3: RigS3, prefix: str, first: int = 0) -> str:
    """Uploads `SAMPLES` pictures as `<class>/<index>.png`; returns their URI."""
    files = {
        f"{BUCKET}/{prefix}/{label}/{index:03}.png": picture(label, index)
        for label in range(CLASSES)
        for index in range(first, first + A_CLASS)
    }
    s3.files().pipe(files)
    return f"s3://{BUCKET}/{prefix}"


def upload_artifact(s3: RigS3, prefix: str, **shape: Any) -> str:
    """Uploads a small random encoder; returns its URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder"
        save_tiny_artifact(path, **shape)
        s3.files().put(f"{path}/", f"{BUCKET}/{prefix}/", recursive=True)
    return f"s3://{BUCKET}/{prefix}"
