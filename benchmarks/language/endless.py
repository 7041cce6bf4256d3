"""Endless streams: does the last token cost what the first ones did, in time and memory?

    PYTHONPATH=. python benchmarks/language/endless.py --tokens 1000000  # a small random model
    PYTHONPATH=. python benchmarks/language/endless.py --tokens 50000 --model data/smollm2 \
        --cache 256
    PYTHONPATH=. python benchmarks/language/endless.py --tokens 4000000 --sessions 64 \
        --model data/smollm2 \
        --cache 1024 --device cuda --dtype bfloat16 --graphs

Every token is decoded on its own, greedily, from the one before. `--sessions` streams decode in one
batch and share the tokens evenly. Compared: the first 1% of the steps after the cache is full with
the last 1%, by their median, and memory at both: resident, and the device's own on CUDA. With
`--chunk` the tokens between the two are random ones, read that many at a time: the same stream for
the cache, in less time.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.progress import track

from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.modes import now
from models.sink_lm.network.buckets import BucketDecoder
from models.sink_lm.network.config import LMConfig
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.tuning import tune

SMALL = LMConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    tokens: int = 1_000_000
    sessions: int = 1
    model: str | None = None
    cache: int = 256
    sinks: int = 4
    threads: int = 1
    chunk: int | None = None
    device: str = "cpu"
    graphs: bool = False
    dtype: Annotated[str, tyro.conf.arg(help="float32, bfloat16, int8 or int4")] = "float32"
    json: Path | None = None


class Streams:
    """Sessions that decode together."""

    def __init__(self, cfg: Config) -> None:
        dtype = getattr(torch, cfg.dtype)
        if cfg.model is None:
            self.model = Llama(SMALL).eval().to(cfg.device, dtype)
        else:
            self.model = load_model(cfg.model, dtype=dtype, device=cfg.device)
            tune(self.model)
        self.slabs = self.model.slabs(sessions=cfg.sessions, capacity=cfg.cache + 1)
        self.slots = [self.slabs.allocate(cfg.sinks) for _ in range(cfg.sessions)]
        self.tokens = torch.arange(cfg.sessions, device=self.slabs.device)
        # As long as it will get, or the clock's own notes would show as growing memory.
        self.times = array("d", [0.0]) * (cfg.tokens // cfg.sessions)
        self.cpu_times = self.times[:]
        self.decoded = 0
        self._graphs = BucketDecoder(self.model, self.slabs) if cfg.graphs else None

    def decode(self, steps: int) -> None:
        for _ in track(range(steps)):
            started, cpu_started = now(self.slabs.device), time.process_time()
            if self._graphs is not None:
                logits = self._graphs(self.tokens, self.slots)
            else:
                logits = self.model.decode(self.tokens, self.slabs, self.slots)
            self.tokens = logits.argmax(-1)
            self.times[self.decoded] = now(self.slabs.device) - started
            self.cpu_times[self.decoded] = time.process_time() - cpu_started
            self.decoded += 1

    def read(self, count: int, chunk: int) -> None:
        """Random tokens, the same for every session."""
        for start in track(range(0, count, chunk)):
            size = min(chunk, count - start)
            part = torch.randint(self.model.cfg.vocab_size, (size,), device=self.slabs.device)
            for slot in self.slots:
                self.model.prefill(part, self.slabs, slot, logits="none")


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    streams = Streams(cfg)
    steps = cfg.tokens // cfg.sessions
    share = max(steps // 100, 1)
    steady, end = cfg.cache + share, steps - share
    if end < steady:
        raise SystemExit(f"--tokens {cfg.tokens}: {steps} a session do not outlast the cache")
    started = now(streams.slabs.device)
    streams.decode(steady)
    early = memory_bytes(cfg.device)
    if cfg.chunk is None:
        streams.decode(end - steady)
    else:
        streams.read(end - steady, cfg.chunk)
    streams.decode(share)
    late = memory_bytes(cfg.device)
    seconds = now(streams.slabs.device) - started
    report = {
        "tokens": steps * cfg.sessions,
        "sessions": cfg.sessions,
        "position": streams.slabs.length(0),
        "tokens_per_s": steps * cfg.sessions / seconds,
        "settings": {"cache": cfg.cache, "dtype": cfg.dtype, "device": cfg.device},
        **latency(streams.times[: streams.decoded], cfg.cache, steady, share),
        "tenths_ms": tenths(streams.times[: streams.decoded], cfg.cache),
        "tenths_cpu_ms": tenths(streams.cpu_times[: streams.decoded], cfg.cache),
        "memory": {
            name: {"early_mib": early[name] / 2**20, "late_mib": late[name] / 2**20}
            for name in late
        },
        "rss_ratio": late["resident"] / early["resident"],
    }
    print(json.dumps(report, indent=2))
    if cfg.json:
        cfg.json.write_text(json.dumps(report, indent=2) + "\n")


def latency(times: array[float], cache: int, steady: int, share: int) -> dict[str, float]:
    first = torch.tensor(times[cache:steady]).median()
    last = torch.tensor(times[-share:]).median()
    ordered = sorted(times[cache:])  # Tensor.quantile refuses more than 16 million numbers
    return {
        "first_ms": float(first) * 1e3,
        "last_ms": float(last) * 1e3,
        "latency_ratio": float(last / first),
        "decoded_steps": len(times),
        "p99_ms": ordered[int(0.99 * (len(ordered) - 1))] * 1e3,
    }


def tenths(times: array[float], cache: int) -> list[float]:
    """Median of each tenth of the decoded steps; the first one begins when the cache is full."""
    size = max(len(times) // 10, cache + 1)
    starts = range(0, len(times) - size + 1, size)
    parts = [times[max(start, cache) : start + size] for start in starts]
    return [round(float(torch.tensor(part).median()) * 1e3, 3) for part in parts]


def memory_bytes(device: str) -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"resident": pages * os.sysconf("SC_PAGE_SIZE")}
    return found if device == "cpu" else found | {"device": torch.cuda.memory_allocated(device)}


if __name__ == "__main__":
    main(tyro.cli(Config))
