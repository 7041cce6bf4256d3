"""Many live streams over `/v1/streams` on loopback: errors, lag, drops, memory.

    python benchmarks/serving/video_streams.py                               # 64 streams, 5 minutes
    python benchmarks/serving/video_streams.py --streams 8 --seconds 20      # a quick look

Starts the Serve application with a small clip encoder of random weights (speed does not depend on
them), opens that many WebSockets, sends each JPEG frames at a constant rate and acknowledges every
embedding. Latency is the client's: from sending a window's last frame to having its embedding.
Clients, proxy, ingress and embedder share this machine. Memory is read every few seconds.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import tyro
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from benchmarks.serving.serve_memory import resident_mib

APP = "streams"
PROCESSES = (f"ServeReplica:{APP}:Embedder", f"ServeReplica:{APP}:Ingress", "ProxyActor")
END_WITHIN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    streams: int = 64
    """Connections at once."""
    seconds: float = 300.0
    """How long each sends."""
    fps: float = 4.0
    """Frames a second and stream."""
    every: int = 4
    """Frames from one embedding to the next."""
    queue: int = 32
    """Frames the server may hold for a stream before it drops the oldest."""
    preset: str = "video_micro"
    """Row of `models.encoders.shape.PRESETS`."""
    image_size: int = 64
    """Pixels on a side of the encoder's input."""
    patch_size: int = 16
    """Pixels on a side of a patch."""
    frames: int = 8
    """Frames of a clip."""
    jpeg_size: tuple[int, int] = (96, 72)
    """Width and height of the frames (JPEG, quality 85)."""
    threads: int = 1
    """Torch threads of the embedder."""
    request_timeout_s: float | None = None
    """Serve's, for its HTTP proxy; it ends WebSockets too."""
    out: str = ""
    """Also write the results to this JSON file."""


@dataclass
class Readings:
    """What all clients saw."""

    sent: int = 0
    latency_s: list[float] = field(default_factory=list)
    server_lag_s: list[float] = field(default_factory=list)
    received: int = 0
    dropped: int = 0
    rejected: int = 0
    ended: int = 0
    errors: list[str] = field(default_factory=list)
    out_of_order: int = 0
    memory_mib: list[dict[str, float]] = field(default_factory=list)


def make_jpegs(config: Config, count: int = 32) -> list[bytes]:
    """Smooth random pictures."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize(config.jpeg_size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        jpegs.append(buffer.getvalue())
    return jpegs


def write_artifact(config: Config, folder: Path) -> None:
    """A random encoder of clips."""
    from models.artifacts.artifact import save_artifact
    from models.encoders.vit import build_encoder
    from models.media.preprocessing import Preprocessing

    encoder = build_encoder(
        config.preset,
        image_size=config.image_size,
        patch_size=config.patch_size,
        frames=config.frames,
        tubelet=2,
    )
    prep = Preprocessing(image_size=config.image_size, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_artifact(folder, encoder, prep, {"run": "benchmark", "step": 0, "manifest_hash": ""})


class Client:
    """One stream.

    Args:
        config: what to send.
        number: of the stream; it shifts the phase, so that not all send at once.
        jpegs: sent in turn.
        readings: where results go.
    """

    def __init__(self, config: Config, number: int, jpegs: list[bytes], readings: Readings) -> None:
        self._config, self._number, self._jpegs = config, number, jpegs
        self._readings = readings
        self._sent_at: list[float] = []

    async def run(self, url: str, start_at: float) -> None:
        """Streams for the given time."""
        try:
            async with connect(url, max_size=None, open_timeout=60) as connection:
                start = {"type": "start", "every": self._config.every, "queue": self._config.queue}
                await connection.send(json.dumps(start | {"encoding_format": "base64"}))
                reader = asyncio.create_task(self._read(connection))
                await self._send(connection, start_at)
                await connection.send('{"type": "end"}')
                async with asyncio.timeout(END_WITHIN_S):
                    await reader
        except (ConnectionClosed, OSError, TimeoutError) as error:
            self._readings.errors.append(f"stream {self._number}: {type(error).__name__} {error}")

    async def _send(self, connection: ClientConnection, start_at: float) -> None:
        period = 1 / self._config.fps
        due = start_at + period * self._number / self._config.streams
        end = start_at + self._config.seconds
        while due < end:
            await asyncio.sleep(due - time.perf_counter())
            self._sent_at.append(time.perf_counter())
            await connection.send(self._jpegs[len(self._sent_at) % len(self._jpegs)])
            self._readings.sent += 1
            due += period

    async def _read(self, connection: ClientConnection) -> None:
        readings, expected = self._readings, 0
        async for text in connection:
            message = json.loads(text)
            if message["type"] == "embedding":
                sent_at = self._sent_at[message["last_frame"]]
                readings.latency_s.append(time.perf_counter() - sent_at)
                readings.server_lag_s.append(message["lag_s"])
                readings.out_of_order += message["index"] != expected
                expected += 1
                await connection.send(json.dumps({"type": "ack", "index": message["index"]}))
            elif message["type"] == "ended":
                readings.ended += 1
                for name in ("received", "dropped", "rejected"):
                    setattr(readings, name, getattr(readings, name) + message[name])
                return
            elif message["type"] == "error":
                readings.errors.append(f"stream {self._number}: {message['error']}")


async def watch(seconds: float, readings: Readings) -> None:
    """Reads memory until cancelled or for that long."""
    for _ in range(int(seconds / 5) + 1):
        readings.memory_mib.append(resident_mib(PROCESSES))
        await asyncio.sleep(5)


async def measure(config: Config, url: str) -> Readings:
    """All streams at once."""
    readings, jpegs = Readings(), make_jpegs(config)
    start_at = time.perf_counter() + 2.0 + config.streams / 50  # all are connected by then
    clients = [Client(config, number, jpegs, readings) for number in range(config.streams)]
    watcher = asyncio.create_task(watch(config.seconds, readings))
    await asyncio.gather(*(client.run(url, start_at) for client in clients))
    watcher.cancel()
    readings.memory_mib.append(resident_mib(PROCESSES))
    return readings


def quantiles_ms(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the greatest."""
    if not values:
        return {}
    found = np.quantile(values, (0.5, 0.9, 0.99, 1.0)) * 1e3
    return dict(zip(("p50", "p90", "p99", "max"), found.round(1).tolist(), strict=True))


def summary(config: Config, readings: Readings) -> dict[str, Any]:
    """What to print."""
    memory = readings.memory_mib
    return {
        "config": asdict(config),
        "frames_sent": readings.sent,
        "frames_received": readings.received,
        "frames_dropped": readings.dropped,
        "frames_rejected": readings.rejected,
        "embeddings": len(readings.latency_s),
        "embeddings_per_s": round(len(readings.latency_s) / config.seconds, 1),
        "streams_ended": readings.ended,
        "out_of_order": readings.out_of_order,
        "errors": readings.errors,
        "latency_ms": quantiles_ms(readings.latency_s),
        "server_lag_ms": quantiles_ms(readings.server_lag_s),
        "memory_mib": {"after_a_fifth": memory[len(memory) // 5], "end": memory[-1]},
    }


def main(config: Config) -> None:
    """Serves, measures, prints."""
    import ray
    from ray import serve as ray_serve

    from serve.app import build_app
    from serve.embeddings.settings import ServeSettings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "encoder"
        write_artifact(config, folder)
        settings = ServeSettings(
            artifact=str(folder),
            threads=config.threads,
            batch_size=64,
            max_streams=config.streams,
            stream_queue=config.queue,
        )
        http = {"host": "127.0.0.1", "port": port, "request_timeout_s": config.request_timeout_s}
        ray_serve.start(http_options=http)
        ray_serve.run(build_app(settings), name=APP)
        readings = asyncio.run(measure(config, f"ws://127.0.0.1:{port}/v1/streams"))
        report = summary(config, readings)
        print(json.dumps(report, indent=2))
        if config.out:
            Path(config.out).write_text(json.dumps(report, indent=2) + "\n")
        ray_serve.shutdown()
    ray.shutdown()
    if readings.errors:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
