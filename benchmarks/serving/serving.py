"""Throughput and latency of `/v1/embeddings` on loopback, against the bare batched loop.

    python benchmarks/serving/serving.py  # ViT-S/16 at 224, 10,000 requests
    python benchmarks/serving/serving.py --requests 50 200 600        # a quick look

The bare loop decodes the same JPEGs with the same number of decoder threads and runs the same
encoder on full batches with the same number of torch threads, in one process, without HTTP. It
runs before and after the endpoint, because machines drift. Weights are random: speed does not
depend on them. Everything stays on this machine; every phase ends by count or by time.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

import numpy as np
import tyro
from PIL import Image

HOST, APP = "127.0.0.1", "bench"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure, and for how long at most."""

    preset: str = "vit_s"
    """Row of `models.encoders.shape.PRESETS`."""
    image_size: int = 224
    """Pixels on a side of the encoder's input."""
    patch_size: int = 16
    """Pixels on a side of a patch."""
    dtype: str = "fp32"
    """fp32 or bf16, in the endpoint and in the bare loop."""
    threads: int = 2
    """Torch threads of the embedder and of the bare loop."""
    decode_threads: int = 2
    """Decoder threads of the ingress and of the bare loop."""
    batch_size: int = 32
    """Images in one forward pass at most; the bare loop's batches are always full."""
    max_wait_ms: float = 2.0
    """See `ServeSettings.max_wait_ms`."""
    jpeg_size: tuple[int, int] = (320, 256)
    """Width and height of the JPEGs (quality 90) that are sent."""
    images: int = 64
    """Different JPEGs, sent in turn."""
    concurrency: tuple[int, ...] = (1, 8, 32)
    """Clients that each wait for a reply before they ask again; one image a request."""
    requests: tuple[int, ...] = (1_000, 3_000, 6_000)
    """Requests at each concurrency."""
    warm_up: int = 64
    """Requests before the clock starts, at each concurrency."""
    max_seconds: float = 900.0
    """End a level after this time even if requests are left."""
    bare_images: int = 512
    """Images of each bare loop."""
    out: str = ""
    """Also write the results to this JSON file."""


def make_jpegs(config: Config) -> list[bytes]:
    """Smooth random pictures with some noise: they compress about as photographs do."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(config.images):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize(config.jpeg_size, Image.Resampling.BICUBIC), np.int16)
        noisy = picture + rng.normal(0, 6, picture.shape).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    return jpegs


def write_artifact(config: Config, folder: pathlib.Path) -> None:
    from models.artifacts.artifact import save_artifact
    from models.encoders.vit import build_encoder
    from models.media.preprocessing import Preprocessing

    encoder = build_encoder(
        config.preset, image_size=config.image_size, patch_size=config.patch_size
    )
    prep = Preprocessing(image_size=config.image_size, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_artifact(folder, encoder, prep, {"run": "benchmark", "step": 0, "manifest_hash": ""})


def settings_for(config: Config, folder: str) -> Any:
    from serve.embeddings.settings import ServeSettings

    return ServeSettings(
        artifact=folder,
        dtype=config.dtype,  # type: ignore[arg-type]
        threads=config.threads,
        decode_threads=config.decode_threads,
        batch_size=config.batch_size,
        max_wait_ms=config.max_wait_ms,
    )


def bare_loop(config: Config, folder: str, jpegs: list[bytes]) -> dict[str, float]:
    """Decode and forward, batch after batch, nothing else."""
    import torch

    from serve.embeddings.media.inputs import to_input
    from serve.embeddings.replica.embedder import Encoder

    torch.set_num_threads(config.threads)
    encoder = Encoder(settings_for(config, folder))
    pool = ThreadPoolExecutor(config.decode_threads)

    def decode(index: int) -> Any:
        data = jpegs[index % len(jpegs)]
        return to_input(data, encoder.preprocessing, max_pixels=10**8, param="input")

    def run(start: int) -> tuple[float, float]:
        began = time.perf_counter()
        images = list(pool.map(decode, range(start, start + config.batch_size)))
        decoded = time.perf_counter()
        encoder.run([(image.input, "mean") for image in images])
        return decoded - began, time.perf_counter() - decoded

    run(0)
    before, began = time.process_time(), time.perf_counter()
    phases = [run(start) for start in range(0, config.bare_images, config.batch_size)]
    wall, images = time.perf_counter() - began, len(phases) * config.batch_size
    return {
        "images_per_s": images / wall,
        "cpu_ms_per_image": (time.process_time() - before) / images * 1e3,
        "decode_share": sum(decode_s for decode_s, _ in phases) / wall,
    }


def make_requests(port: int, jpegs: list[bytes]) -> list[bytes]:
    """Complete HTTP requests: the client must not spend the server's cores on building them."""
    requests = []
    for jpeg in jpegs:
        uri = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        body = json.dumps({"input": uri, "encoding_format": "base64"}).encode()
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: {HOST}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


def client(
    port: int, requests: list[bytes], concurrency: int, count: int, max_seconds: float
) -> dict[str, Any]:
    """Closed loop over kept-alive connections; returns latencies, errors, wall and CPU time."""
    latencies: list[float] = []
    errors: list[str] = []
    numbers = iter(range(count))

    async def ask_in_turn(deadline: float) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        for number in numbers:
            if time.perf_counter() > deadline:
                break
            began = time.perf_counter()
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            if head[9:12] == b"200":
                latencies.append(time.perf_counter() - began)
            else:
                errors.append(f"{head[9:12].decode()} {body[:200]!r}")
        writer.close()

    async def run() -> None:
        deadline = time.perf_counter() + max_seconds
        await asyncio.gather(*(ask_in_turn(deadline) for _ in range(concurrency)))

    cpu, began = time.process_time(), time.perf_counter()
    asyncio.run(run())
    wall = time.perf_counter() - began
    return {
        "latencies": latencies,
        "errors": errors,
        "wall_s": wall,
        "cpu_s": time.process_time() - cpu,
    }


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function in a fresh process: its own memory, threads and CPU account."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def cpu_seconds() -> dict[str, float]:
    """CPU time so far of this run's Ray processes, by role."""
    tick = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    used: dict[int, tuple[str, float]] = {}
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # gone meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = (name, (int(fields[11]) + int(fields[12])) / tick)
    total: dict[str, float] = {}
    for pid, (name, seconds) in used.items():
        ancestor = pid
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        if ancestor and pid != os.getpid():
            role = role_of(name)
            total[role] = total.get(role, 0.0) + seconds
    return total


def role_of(command: str) -> str:
    roles = ("Ingress", "Embedder", "Telemetry", "ProxyActor", "ServeController")
    return next((role for role in roles if role in command[:80]), "rest of Ray")


def measure(port: int, config: Config, requests: list[bytes], level: int) -> dict[str, Any]:
    """One concurrency: warm-up, then the counted requests."""
    concurrency, count = config.concurrency[level], config.requests[level]
    in_process(client, port, requests, concurrency, config.warm_up, config.max_seconds)
    before = cpu_seconds()
    got = in_process(client, port, requests, concurrency, count, config.max_seconds)
    after = cpu_seconds()
    cpu = {role: after[role] - before.get(role, 0.0) for role in after} | {"client": got["cpu_s"]}
    done = max(1, len(got["latencies"]))
    p50, p99 = np.percentile(got["latencies"] or [0.0], [50, 99])
    return {
        "concurrency": concurrency,
        "requests": len(got["latencies"]) + len(got["errors"]),
        "errors": len(got["errors"]),
        "first_errors": got["errors"][:3],
        "images_per_s": done / got["wall_s"],
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "cpu_ms_per_request": {role: s / done * 1e3 for role, s in sorted(cpu.items())},
    }


def batch_sizes(port: int) -> float:
    """Mean images in a forward pass so far, from `/metrics`."""
    import httpx

    time.sleep(5.5)  # replicas report every five seconds
    values = {}
    for line in httpx.get(f"http://{HOST}:{port}/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        values[name] = value
    return float(values["rayjepa_batch_size_sum"]) / float(values["rayjepa_batch_size_count"])


def serve_and_measure(config: Config, folder: str, jpegs: list[bytes]) -> list[dict[str, Any]]:
    import ray
    from ray import serve as ray_serve

    from serve.app import build_app

    os.environ.pop("RAY_ADDRESS", None)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        ray_serve.start(http_options={"host": HOST, "port": port})
        ray_serve.run(build_app(settings_for(config, folder)), name=APP)
        requests = make_requests(port, jpegs)
        levels = []
        for level in range(len(config.concurrency)):
            levels.append(measure(port, config, requests, level))
            print(json.dumps(levels[-1]), flush=True)
        print(f"mean batch size over the run: {batch_sizes(port):.1f}")
        return levels
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def table(bare: list[dict[str, float]], levels: list[dict[str, Any]]) -> str:
    """The results as Markdown; the ratio is to the mean of the two bare loops."""
    reference = float(np.mean([run["images_per_s"] for run in bare]))
    rows = [
        "| | images/s | of bare loop | p50 ms | p99 ms | errors / requests |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in zip(("before", "after"), bare, strict=True):
        rows.append(f"| bare loop, {name} | {run['images_per_s']:.1f} | | | | |")
    for level in levels:
        rate = level["images_per_s"]
        rows.append(
            f"| endpoint, {level['concurrency']} clients | {rate:.1f} | {rate / reference:.2f} | "
            f"{level['p50_ms']:.0f} | {level['p99_ms']:.0f} | "
            f"{level['errors']} / {level['requests']} |"
        )
    shares = levels[-1]["cpu_ms_per_request"]
    parts = ", ".join(f"{role} {ms:.1f}" for role, ms in shares.items())
    cpu = bare[0]["cpu_ms_per_image"]
    return "\n".join(
        [*rows, "", f"CPU ms per request at the last level: {parts}; bare loop {cpu:.1f}."]
    )


def main() -> None:
    """Runs the benchmark and prints the table."""
    config = tyro.cli(Config)
    if len(config.concurrency) != len(config.requests):
        raise SystemExit("--requests needs one number for each --concurrency")
    jpegs = make_jpegs(config)
    print(f"{len(jpegs)} JPEGs, mean {np.mean([len(jpeg) for jpeg in jpegs]) / 1024:.1f} KiB")
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/{config.preset}"
        in_process(write_artifact, config, pathlib.Path(folder))
        bare = [in_process(bare_loop, config, folder, jpegs)]
        print(json.dumps(bare[0]), flush=True)
        levels = serve_and_measure(config, folder, jpegs)
        bare.append(in_process(bare_loop, config, folder, jpegs))
        print(json.dumps(bare[1]), flush=True)
    print(table(bare, levels))
    if config.out:
        result = {"config": dataclasses.asdict(config), "bare": bare, "levels": levels}
        pathlib.Path(config.out).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
