"""Ours, llama.cpp and `transformers` in turns on one GGUF file: medians of rounds and their spread.

    PYTHONPATH=. python benchmarks/language/in_turns.py --gguf data/smollm2/FILE.gguf \
        --peer-python peers/bin/python

One session: our engine (prompt, ticks, sampler, text) beside llama.cpp's server, both greedy and at
a full cache. Many sessions: a decode step of ours beside one of `transformers` in float32. What the
peers compute is said in peer_llama_cpp.py, which runs in an environment of its own, and in
peer_transformers.py. A round takes every peer once, so that a machine that slows down slows all.
Tokens per CPU second of the process tell more than tokens per second on a machine that others use.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.language.peer_transformers import load_theirs, time_ours, time_theirs
from models.sink_lm.checkpoints.dtypes import dtype_of
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.checkpoints.tokenizer import Tokenizer, load_tokenizer
from models.sink_lm.dtype_names import DTypeName, KernelsName
from models.sink_lm.engine.engine import Engine
from models.sink_lm.engine.sampling_params import SamplingParams
from models.sink_lm.network.int4 import INT4
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.tuning import tune


@dataclass(frozen=True, kw_only=True)
class Config:
    gguf: Path
    peer_python: Path | None = None
    """Python of an environment with xllamacpp; None leaves llama.cpp out."""
    caches: tuple[int, ...] = (256, 1024)
    sessions: int = 16
    rounds: int = 3
    tokens: int = 96
    steps: int = 6
    threads: int = 1
    dtypes: tuple[DTypeName, ...] = ("int4",)
    kernels: tuple[KernelsName, ...] = ("auto",)
    """What decodes with int4."""


def engine_speed(
    model: Llama, tokenizer: Tokenizer, cache: int, tokens: int
) -> tuple[float, float]:
    """Tokens per second and per CPU second of one session of the engine, whose cache is full."""
    engine = Engine(model, tokenizer, sessions=1, capacity=cache + 1, prefill_chunk=256)
    engine.open("one")
    prompt = torch.randint(1000, 40_000, (cache + 1,)).tolist()
    rules = SamplingParams(temperature=0.0, max_tokens=tokens + 9, ignore_eos=True)
    generation = engine.submit("one", prompt, rules)
    taken = 0
    while taken < 8:
        engine.tick()
        taken += len(generation.take())
    started, cpu_started, before = time.perf_counter(), time.process_time(), taken
    while taken < before + tokens:
        engine.tick()
        taken += len(generation.take())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return (taken - before) / seconds, (taken - before) / cpu_seconds


def llama_cpp_speed(cfg: Config, cache: int) -> tuple[float, float]:
    script = Path(__file__).with_name("peer_llama_cpp.py")
    command = [str(cfg.peer_python), str(script), "--gguf", str(cfg.gguf)]
    command += ["--caches", str(cache), "--threads", str(cfg.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    return row["tokens_per_s"], row["tokens_per_cpu_s"]


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    models = {}
    for name in cfg.dtypes:
        dtype = dtype_of(name, str(cfg.gguf), "cpu")
        for kernels in cfg.kernels if dtype == INT4 else ("auto",):
            model = load_model(str(cfg.gguf), dtype=dtype, kernels=kernels)
            tune(model)
            models[f"{name} {kernels}" if dtype == INT4 else name] = model
    theirs, tokenizer = load_theirs(cfg.gguf, torch.float32, "cpu"), load_tokenizer(str(cfg.gguf))
    rows: dict[str, list[float]] = {}

    def note(what: str, per_second: float, per_cpu_second: float) -> None:
        rows.setdefault(what, []).append(per_second)
        rows.setdefault(f"{what}, per CPU second", []).append(per_cpu_second)
        print(json.dumps({what: (per_second, per_cpu_second)}), flush=True)

    for _ in range(cfg.rounds):
        for cache in cfg.caches:
            if cfg.peer_python:
                note(f"llama.cpp, 1 session, cache {cache}", *llama_cpp_speed(cfg, cache))
            for name, model in models.items():
                speeds = engine_speed(model, tokenizer, cache, cfg.tokens)
                note(f"ours {name}, 1 session, cache {cache}", *speeds)
            prompt, many = torch.randint(1000, 40_000, (cache,)), cfg.sessions
            seconds = time_theirs(theirs, prompt, many, cfg.steps)
            speeds = [many / each for each in seconds]
            note(f"transformers, {many} sessions, cache {cache}", *speeds)
            for name, model in models.items():
                speeds = [many / each for each in time_ours(model, prompt, many, cfg.steps)]
                note(f"ours {name}, {many} sessions, cache {cache}", *speeds)
    for what, values in rows.items():
        print(f"{what}: {statistics.median(values):.1f} tokens/s", end=" ")
        print(f"({min(values):.1f} to {max(values):.1f}, {len(values)} rounds)")


if __name__ == "__main__":
    main(tyro.cli(Config))
