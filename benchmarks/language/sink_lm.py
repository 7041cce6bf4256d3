"""Decode speed of the sink cache against the original algorithm and against re-computation.

    PYTHONPATH=. python benchmarks/language/sink_lm.py --model data/smollm2 --caches 256 1024 \
        --sessions 1 8

One run, one model, three ways to get the next token of B full streams:

    ours       ring of keys rotated once (models/sink_lm)
    original   the published procedure on the same weights: keys kept un-rotated, every step the
               cache is concatenated, rotated by cache index as a whole, its heads repeated for the
               groups, and sliced again (Xiao et al. 2023, section 3.2)
    recompute  a forward pass over the whole window for every token of every session

`attention` is the time inside attention alone, `token` the whole step divided by the sessions.
Ours and the original are first held to be one function, in float64 on random tokens. With `--device
cuda` every timed part waits for the device, which adds to all of them alike; `--graphs` times ours
as CUDA graphs (`BucketDecoder`) as well, of which attention cannot be timed apart.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.modes import now
from models.sink_lm.network.attention import DecodeAttention
from models.sink_lm.network.buckets import BucketDecoder
from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.rope import rotation
from models.sink_lm.network.tuning import tune

SINKS = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    caches: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    sessions: tuple[int, ...] = (1, 8, 16)
    steps: int = 15
    threads: int = 2
    device: str = "cpu"
    graphs: bool = False
    dtype: Annotated[str, tyro.conf.arg(help="float32, bfloat16, int8 or int4")] = "float32"
    json: Path | None = None


class Timed:
    """Wraps an attention and adds up its time."""

    def __init__(self, attend: object) -> None:
        self.attend, self.seconds = attend, 0.0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        started = now(q.device)
        out = self.attend(layer, q, k, v)  # type: ignore[operator]
        self.seconds += now(q.device) - started
        return out


class OriginalAttention:
    """Evict, concatenate, rotate everything, repeat, multiply: one decode step of B sessions."""

    def __init__(self, model: Llama, cache: list[tuple[Tensor, Tensor]], size: int) -> None:
        self.model, self.cache, self.size = model, cache, size
        kept = min(cache[0][0].shape[2], size)
        dtype, device = cache[0][0].dtype, cache[0][0].device
        positions = torch.arange(kept + 1, device=device)
        self.keys_at = rotation(positions, *model.rotary(device), dtype)
        self.query_at = rotation(positions[-1:], *model.rotary(device), dtype)

    def __call__(self, layer: int, q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor) -> Tensor:
        keys, values = self.cache[layer]
        keys = torch.cat((keys, k_BHD[:, :, None]), dim=2)
        values = torch.cat((values, v_BHD[:, :, None]), dim=2)
        first, second = keys.chunk(2, dim=-1)
        cos, sin = self.keys_at.cos_B1D[:, 0], self.keys_at.sin_B1D[:, 0]
        turned = keys * cos + torch.cat((second, first), dim=-1) * sin
        group = q_BHD.shape[1] // keys.shape[1]
        all_keys = turned.repeat_interleave(group, dim=1)
        all_values = values.repeat_interleave(group, dim=1)
        scores = self.query_at(q_BHD)[:, :, None] @ all_keys.mT * q_BHD.shape[-1] ** -0.5
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
            q_BHD.dtype
        )
        out = (weights @ all_values)[:, :, 0].flatten(1)
        if keys.shape[2] > self.size:
            keys = torch.cat((keys[:, :, :SINKS], keys[:, :, SINKS + 1 :]), dim=2)
            values = torch.cat((values[:, :, :SINKS], values[:, :, SINKS + 1 :]), dim=2)
        self.cache[layer] = (keys, values)
        return out


def unrotated_cache(model: Llama, sessions: int, size: int) -> list[tuple[Tensor, Tensor]]:
    cfg, weight = model.cfg, model.embed.weight
    shape = (sessions, cfg.num_kv_heads, size, cfg.head_dim)

    def make() -> Tensor:
        return torch.randn(shape, device=weight.device).to(weight.dtype)

    return [(make(), make()) for _ in range(cfg.num_layers)]


def check_same_function(path: str) -> float:
    """Largest difference of float64 logits, ours against the original's, over three caches.

    Raises:
        AssertionError: they are two functions.
    """
    model = load_model(path, dtype=torch.float64)
    size, stream = 24, torch.randint(model.cfg.vocab_size, (72,))
    slabs = model.slabs(sessions=1, capacity=size + 1)
    slot = slabs.allocate(SINKS)
    cache = unrotated_cache(model, 1, 0)
    worst = 0.0
    for token in stream.split(1):
        ours = model.decode(token, slabs, [slot])
        with torch.inference_mode():
            theirs = model.logits(model.run(token, OriginalAttention(model, cache, size)))
        worst = max(worst, float((ours - theirs).abs().max()))
    if not worst < 1e-6:
        raise AssertionError(f"ours and the original differ by {worst}")
    return worst


def full_slabs(model: Llama, cache: int, sessions: int) -> tuple[Slabs, list[int]]:
    slabs = model.slabs(sessions=sessions, capacity=cache + 1)
    slots = [slabs.allocate(SINKS) for _ in range(sessions)]
    slabs.keys_LNHCD.normal_()
    slabs.values_LNHCD.normal_()
    for slot in slots:
        slabs.advance(slot, 3 * cache)
    return slabs, slots


@torch.inference_mode()
def time_ours(model: Llama, cache: int, sessions: int, steps: int) -> tuple[float, float]:
    slabs, slots = full_slabs(model, cache, sessions)

    def attend() -> DecodeAttention:
        return DecodeAttention(slots, slabs, *model.rotary(slabs.device))

    def after() -> None:
        for slot in slots:
            slabs.advance(slot, 1)

    return time_steps(model, attend, sessions, steps, after)


def time_graphs(model: Llama, cache: int, sessions: int, steps: int) -> float:
    """Median seconds of a step by `BucketDecoder`; off CUDA it runs the same step eagerly."""
    slabs, slots = full_slabs(model, cache, sessions)
    decode, times = BucketDecoder(model, slabs), []
    tokens = torch.randint(model.cfg.vocab_size, (sessions,), device=slabs.device)
    for _ in range(steps + 3):
        started = now(slabs.device)
        decode(tokens, slots)
        times.append(now(slabs.device) - started)
    return float(torch.tensor(times[3:]).median())


@torch.inference_mode()
def time_original(model: Llama, cache: int, sessions: int, steps: int) -> tuple[float, float]:
    held = unrotated_cache(model, sessions, cache)
    return time_steps(
        model, lambda: OriginalAttention(model, held, cache), sessions, steps, lambda: None
    )


def time_steps(model, attend, sessions, steps, after) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Median seconds of (a whole step, its attention)."""
    whole, inside = [], []
    device = model.embed.weight.device
    tokens = torch.randint(model.cfg.vocab_size, (sessions,), device=device)
    for step in range(steps + 3):
        started = now(device)
        timed = Timed(attend())
        model.logits(model.run(tokens, timed))
        after()
        if step >= 3:
            whole.append(now(device) - started)
            inside.append(timed.seconds)
    return float(torch.tensor(whole).median()), float(torch.tensor(inside).median())


def time_recompute(model: Llama, cache: int, repeats: int = 3) -> float:
    """Median seconds of one token of one session; B sessions take B times as long."""
    slabs = model.slabs(sessions=1, capacity=cache + 1)
    times = []
    for _ in range(repeats):
        slot = slabs.allocate(0)
        tokens = torch.randint(model.cfg.vocab_size, (cache + 1,), device=slabs.device)
        started = now(slabs.device)
        model.prefill(tokens, slabs, slot)
        times.append(now(slabs.device) - started)
        slabs.release(slot)
    return float(torch.tensor(times).median())


def machine(device: str) -> str:
    return torch.cuda.get_device_name(device) if device != "cpu" else platform.processor()


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    difference = check_same_function(cfg.model)
    print(f"ours against the original in float64, largest difference of logits: {difference:.1e}")
    model = load_model(cfg.model, dtype=getattr(torch, cfg.dtype), device=cfg.device)
    tune(model)
    head = ("cache", "sessions", "ours ms", "attention", "original ms", "attention", "recompute ms")
    table = Table(*head, "tokens/s", "attention x", "step x", "x recompute")
    rows = []
    for cache in cfg.caches:
        recompute = time_recompute(model, cache)
        for sessions in cfg.sessions:
            ours, ours_attention = time_ours(model, cache, sessions, cfg.steps)
            original, original_attention = time_original(model, cache, sessions, cfg.steps)
            row = {
                "cache": cache,
                "sessions": sessions,
                "ours_ms": ours * 1e3,
                "ours_attention_ms": ours_attention * 1e3,
                "original_ms": original * 1e3,
                "original_attention_ms": original_attention * 1e3,
                "recompute_ms_per_token": recompute * 1e3,
                "tokens_per_s": sessions / ours,
                "attention_ratio": original_attention / ours_attention,
                "step_ratio": original / ours,
                "recompute_ratio": recompute / (ours / sessions),
            }
            table.add_row(str(cache), str(sessions), *(f"{v:.1f}" for v in list(row.values())[2:]))
            if cfg.graphs:
                row["graphs_ms"] = 1e3 * time_graphs(model, cache, sessions, cfg.steps)
            rows.append(row)
            print(json.dumps(row), flush=True)
    Console(width=140).print(table)
    if cfg.json:
        report = {"machine": machine(cfg.device), "torch": torch.__version__, "rows": rows}
        report |= {"dtype": cfg.dtype, "threads": cfg.threads}
        cfg.json.write_text(json.dumps(report | {"difference": difference}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
