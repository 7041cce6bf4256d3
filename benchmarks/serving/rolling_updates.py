"""Requests while the served model is replaced again and again: none may fail or mix two models.

    python benchmarks/serving/rolling_updates.py             # 2,000 requests over 5 updates
    python benchmarks/serving/rolling_updates.py --requests 200 --updates 2

Each update deploys an encoder with another image size, or with another crop at the same size, or
with another fit. Clients ask all the time. Every vector is compared with what the named model makes
of the picture outside of the server. Encoders are tiny and random: what is tried is the update.
"""

from __future__ import annotations

import base64
import collections
import io
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

import httpx
import numpy as np
import tyro
from PIL import Image

HOST, APP, WIDTH = "127.0.0.1", "updates", 64
MODELS: list[dict[str, Any]] = [
    {"image_size": 64},
    {"image_size": 96},
    {"image_size": 96, "crop_fraction": 0.5},
    {"image_size": 96, "fit": "squash"},
    {"image_size": 32},
    {"image_size": 64, "crop_fraction": 0.75},
]
"""What is deployed one after the other, then from the beginning again."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much to ask, and how often to update."""

    requests: int = 2_000
    """Requests at least; clients go on until the last update is done."""
    updates: int = 5
    """Updates while they ask."""
    replicas: int = 2
    """Replicas of the embedder, and of the ingress."""
    clients: int = 4
    """Clients that each wait for a reply before they ask again."""
    pause_s: float = 0.25
    """Seconds from a reply to the client's next request."""
    pictures: int = 16
    """Different pictures, sent in turn."""


@dataclass
class Load:
    """What the clients have asked and got.

    Attributes:
        replies: number of the picture, status, body and seconds of each.
    """

    url: str
    pictures: list[bytes]
    pause_s: float
    replies: list[tuple[int, int, Any, float]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Asks until it is told to stop."""
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.stop.is_set():
                which = len(self.replies) % len(self.pictures)
                data = base64.b64encode(self.pictures[which]).decode()
                began = time.perf_counter()
                try:
                    reply = http.post("/v1/embeddings", json={"input": data})
                    told = (reply.status_code, reply.json())
                except (httpx.HTTPError, ValueError) as error:
                    told = (0, repr(error))
                self.replies.append((which, *told, time.perf_counter() - began))
                time.sleep(self.pause_s)


def make_pictures(count: int) -> list[bytes]:
    rng, encoded = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def write_artifact(folder: pathlib.Path, image_size: int, **transform: Any) -> None:
    import torch

    from models.artifacts.artifact import save_artifact
    from models.encoders.shape import EncoderShape
    from models.encoders.vit import VisionTransformer
    from models.media.preprocessing import Preprocessing

    torch.manual_seed(0)
    shape = {"image_size": image_size, "patch_size": image_size // 4, "width": WIDTH}
    encoder = VisionTransformer(EncoderShape(**shape, depth=2, heads=2))
    for weight in encoder.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    colours: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    prep = Preprocessing(image_size=image_size, **colours, **transform)
    save_artifact(folder, encoder, prep, {"run": "benchmark", "step": 0, "manifest_hash": ""})


def vectors_of(folder: pathlib.Path, pictures: list[bytes]) -> np.ndarray:
    """Returns the unit vectors [pictures, WIDTH] that an artifact makes, without a server."""
    import torch

    from models.artifacts.artifact import load_artifact
    from models.media.images import decode_image
    from models.media.preprocessing import eval_transform, normalize

    artifact = load_artifact(folder)
    prep, vectors = artifact.preprocessing, []
    for picture in pictures:
        pixels = torch.from_numpy(eval_transform(decode_image(picture), prep).copy())
        with torch.inference_mode():
            images = normalize(pixels.permute(2, 0, 1)[None], prep.mean, prep.std)
            vectors.append(artifact.encoder(images)[0].mean(dim=0).numpy())
    made = np.stack(vectors)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def deploy(config: Config, folder: pathlib.Path) -> None:
    from ray import serve as ray_serve

    from serve.app import build_app
    from serve.embeddings.settings import ServeSettings

    settings = ServeSettings(
        artifact=str(folder),
        num_replicas=config.replicas,
        ingress_replicas=config.replicas,
        threads=1,
        cpus=0.1,
        ingress_cpus=0.1,
        decode_processes=0,
    )
    ray_serve.run(build_app(settings), name=APP)


def run(config: Config, root: pathlib.Path) -> int:
    import ray
    from ray import serve as ray_serve

    pictures = make_pictures(config.pictures)
    folders = [root / f"model-{number}" for number in range(len(MODELS))]
    for folder, how in zip(folders, MODELS, strict=True):
        write_artifact(folder, **how)
    expected = {folder.name: vectors_of(folder, pictures) for folder in folders}
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray_serve.start(http_options={"host": HOST, "port": port})
    deploy(config, folders[0])
    loads = [Load(f"http://{HOST}:{port}", pictures, config.pause_s) for _ in range(config.clients)]
    threads = [threading.Thread(target=load.run) for load in loads]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    for number in range(1, config.updates + 1):
        deploy(config, folders[number % len(folders)])
        done = sum(len(load.replies) for load in loads)
        print(f"update {number} done after {time.perf_counter() - began:.0f} s, {done} requests")
    while sum(len(load.replies) for load in loads) < config.requests:
        time.sleep(0.1)
    for load in loads:
        load.stop.set()
    for thread in threads:
        thread.join()
    ray_serve.shutdown()
    ray.shutdown()
    return report([reply for load in loads for reply in load.replies], expected)


def report(replies: list[tuple[int, int, Any, float]], expected: dict[str, np.ndarray]) -> int:
    """Prints the counts; returns how many requests failed or were not answered by one model."""
    by_model: collections.Counter[str] = collections.Counter()
    failed, mixed, worst = [], 0, 0.0
    for which, status, body, _ in replies:
        if status != 200:
            failed.append((status, body))
            continue
        by_model[body["model"]] += 1
        vector = np.array(body["data"][0]["embedding"])
        off = float(np.abs(vector - expected[body["model"]][which]).max())
        worst, mixed = max(worst, off), mixed + (off > 1e-5)
    spent = sorted(seconds for *_, seconds in replies)
    print(f"{len(replies)} requests: {len(failed)} failed, {mixed} not the named model's vector")
    print(f"largest difference of a number: {worst:.1e}")
    print(f"answered by {dict(sorted(by_model.items()))}")
    print(f"seconds: median {spent[len(spent) // 2]:.3f}, longest {spent[-1]:.2f}")
    for status, body in failed[:5]:
        print(f"  {status}: {str(body)[:200]}")
    return len(failed) + mixed


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(run(tyro.cli(Config, description=__doc__), pathlib.Path(scratch)) > 0)
