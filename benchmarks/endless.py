"""One endless stream: does the last token cost what the first ones did, in time and memory?

    PYTHONPATH=. python benchmarks/endless.py --tokens 1000000            # a small random model
    PYTHONPATH=. python benchmarks/endless.py --tokens 50000 --model data/smollm2 --cache 256

Every token is decoded on its own, greedily, from the one before. Compared: the first 1% of the
steps after the cache is full with the last 1%, by their median, and resident memory at both. With
`--chunk` the tokens between the two are random ones, read that many at a time: the same stream for
the cache, in less time.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.progress import track

from models.sink_lm.config import LMConfig
from models.sink_lm.llama import Llama

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
    model: str | None = None
    cache: int = 256
    sinks: int = 4
    threads: int = 1
    chunk: int | None = None
    json: Path | None = None


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    model = Llama(SMALL).eval() if cfg.model is None else load(cfg.model)
    slabs = model.slabs(sessions=1, capacity=cfg.cache + 1)
    slot = slabs.allocate(cfg.sinks)
    token = torch.zeros(1, dtype=torch.long)
    share = max(cfg.tokens // 100, 1)
    times: list[float] = []
    steady, end = cfg.cache + share, cfg.tokens - share
    memory = []

    def decode(count: int) -> None:
        nonlocal token
        for _ in track(range(count)):
            started = time.perf_counter()
            token = model.decode(token, slabs, [slot]).argmax(-1)
            times.append(time.perf_counter() - started)

    decode(steady)
    memory.append(resident_bytes())
    if cfg.chunk is None:
        decode(end - steady)
    else:
        middle = torch.randint(model.cfg.vocab_size, (end - steady,))
        for part in track(middle.split(cfg.chunk)):
            model.prefill(part, slabs, slot, logits="none")
    decode(share)
    memory.append(resident_bytes())
    first = torch.tensor(times[cfg.cache : steady]).median()
    last = torch.tensor(times[-share:]).median()
    early, late = memory
    report = {
        "tokens": cfg.tokens,
        "position": slabs.length(slot),
        "first_ms": float(first) * 1e3,
        "last_ms": float(last) * 1e3,
        "latency_ratio": float(last / first),
        "decoded": len(times),
        "p99_ms": float(torch.tensor(times[cfg.cache :]).quantile(0.99)) * 1e3,
        "rss_early_mib": early / 2**20,
        "rss_late_mib": late / 2**20,
        "rss_ratio": late / early,
    }
    print(json.dumps(report, indent=2))
    if cfg.json:
        cfg.json.write_text(json.dumps(report, indent=2) + "\n")


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def load(path: str) -> Llama:
    from models.sink_lm.weights import load_model

    return load_model(path)


if __name__ == "__main__":
    main(tyro.cli(Config))
