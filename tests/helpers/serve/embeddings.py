"""Helpers of tests of serving: a tiny artifact, encoded images, an image server on loopback."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.artifacts.artifact import load_artifact, save_artifact
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.image_size import ImageSize
from models.media.fit import Fit
from models.media.images import decode_image
from models.media.preprocessing import Preprocessing, eval_transform, normalize

if TYPE_CHECKING:
    from ray.serve import Deployment

WIDTH, PATCHES, SIZE = 32, 16, 32


def save_tiny_artifact(folder: Path, *, size: int = SIZE, **transform: Any) -> None:
    """A random encoder with weights large enough that images differ."""
    torch.manual_seed(0)
    encoder = VisionTransformer(
        EncoderShape(image_size=size, patch_size=size // 4, width=WIDTH, depth=2, heads=2)
    )
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    colours: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3)}
    prep = Preprocessing(image_size=size, **colours, **transform)
    save_artifact(folder, encoder, prep, {"run": "test", "step": 0, "manifest_hash": ""})


def save_fitted_artifact(
    folder: Path, fit: Fit, size: ImageSize, *, frames: int = 1, tubelet: int = 1, **more: Any
) -> Path:
    """As `save_tiny_artifact`, with patches of 8 pixels; `more` are further fields of its
    preprocessing."""
    torch.manual_seed(0)
    shape = {"image_size": size, "patch_size": 8, "width": WIDTH, "depth": 2, "heads": 2}
    encoder = VisionTransformer(EncoderShape(**shape, frames=frames, tubelet=tubelet))
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    prep = Preprocessing(
        image_size=size, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), fit=fit, **more
    )
    save_artifact(folder, encoder, prep, {"run": "test", "step": 0, "manifest_hash": ""})
    return folder


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture, so that JPEG and resizing leave something of it."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64_of(data)}"


def png_uri(seed: int) -> str:
    return data_uri(encoded(picture(seed)))


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 99)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@torch.inference_mode()
def direct_tokens(folder: Path, image_bytes: bytes) -> np.ndarray:
    """Computes the tokens [N, D] of one image directly, without a server or a batch."""
    artifact = load_artifact(folder)
    prep = artifact.preprocessing
    pixels = torch.from_numpy(eval_transform(decode_image(image_bytes), prep).copy())
    images = normalize(pixels.permute(2, 0, 1)[None], prep.mean, prep.std)
    return artifact.encoder(images)[0].numpy()


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def miss_killed_replicas_soon(patch: pytest.MonkeyPatch, app: ModuleType) -> None:
    """Makes Serve check the replicas of an app's module twice a second, not every 5 or 10 s."""
    from serve.ingress import deployment

    for module, name in ((app, "model_deployment"), (deployment, "ingress_deployment")):
        patch.setattr(module, name, partial(_watched, getattr(module, name)))


def _watched(make: Callable[..., Deployment], *args: Any) -> Deployment:
    return make(*args).options(health_check_period_s=0.5, graceful_shutdown_wait_loop_s=0.2)


class _Handler(BaseHTTPRequestHandler):
    """Serves /ok.png, /redirect?[TARGET], /loop, /big, /sized?BYTES, /endless, /gzip and /text."""

    def do_GET(self) -> None:
        route, _, query = self.path.partition("?")
        if route == "/ok.png":
            self._send(200, encoded(picture(1)))
        elif route == "/redirect":
            self._send(302, b"", **({"location": query} if query else {}))
        elif route == "/loop":
            self._send(302, b"", location="/loop")
        elif route == "/big":
            self._send(200, b"\x89PNG" + bytes(200_000))
        elif route == "/sized":
            self._unannounced(int(query))
        elif route == "/endless":
            self._endless()
        elif route == "/gzip":
            self._send(200, b"x", content_encoding="gzip")
        elif route == "/text":
            self._send(200, b"<html>not an image</html>")
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _unannounced(self, size: int) -> None:
        """Sends a body without a content length."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(bytes(size))

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(65_536))
        except OSError:
            return  # the client has had enough, as it should

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Logs nothing."""


@contextmanager
def image_server() -> Iterator[int]:
    """Yields the port of a server of good and bad images on 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
