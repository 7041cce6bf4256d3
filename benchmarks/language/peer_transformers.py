"""Decode speed of `transformers` with its own cache on the same weights, beside ours.

    PYTHONPATH=. python benchmarks/language/peer_transformers.py --gguf data/smollm2/FILE.gguf \
        --caches 256 1024 4096 --sessions 1 8 16

`generate` keeps every token (DynamicCache), so this is its speed where its context has grown to the
size of our cache; later it is slower, and beyond the trained context wrong. Its batch is one prompt
read once and repeated, so that filling the caches does not take longer than the measurement.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import tyro
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.modes import now
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.tuning import tune


@dataclass(frozen=True, kw_only=True)
class Config:
    gguf: Path
    caches: tuple[int, ...] = (256, 1024, 4096)
    sessions: tuple[int, ...] = (1, 8, 16)
    steps: int = 24
    threads: int = 1
    device: str = "cpu"
    dtype: Annotated[str, tyro.conf.arg(help="float32, bfloat16 or float16")] = "float32"
    json: Path | None = None


def load_theirs(gguf: Path, dtype: torch.dtype, device: str) -> transformers.PreTrainedModel:
    config = load_gguf_checkpoint(str(gguf))["config"]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    state = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval().to(device, dtype)


class Clock(transformers.LogitsProcessor):
    """Notes when each token's logits are ready, in seconds and CPU seconds of the process."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append((now(scores.device), time.process_time()))
        return scores


@torch.inference_mode()
def time_theirs(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, sessions: int, steps: int
) -> tuple[float, float]:
    """Median seconds, and CPU seconds, of a step that reads those tokens and a few more."""
    past = model(tokens[None, :-1], use_cache=True, logits_to_keep=1).past_key_values
    past.batch_repeat_interleave(sessions)
    prompts = tokens.repeat(sessions, 1)
    clock = Clock()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=past,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        logits_processor=[clock],
    )
    return medians(clock.times[1:])


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    """The median step between times, by each of the two clocks."""
    pairs = list(itertools.pairwise(times))
    return (
        statistics.median(later[0] - before[0] for before, later in pairs),
        statistics.median(later[1] - before[1] for before, later in pairs),
    )


def time_ours(model: Llama, tokens: torch.Tensor, sessions: int, steps: int) -> tuple[float, float]:
    """Median seconds, and CPU seconds, of a step of as many full sessions."""
    slabs = model.slabs(sessions=sessions, capacity=len(tokens) + 1)
    slots = [slabs.allocate(4) for _ in range(sessions)]
    for part in tokens.split(256):
        model.prefill(part, slabs, slots[0], logits="none")
    for slot in slots[1:]:
        slabs.copy(slots[0], slot)
    times, fed = [], tokens[-1:].repeat(sessions)
    for _ in range(steps + 1):
        fed = model.decode(fed, slabs, slots).argmax(-1)
        times.append((now(slabs.device), time.process_time()))
    return medians(times[2:])


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, cfg.dtype)
    ours = load_model(str(cfg.gguf), dtype=dtype, device=cfg.device)
    tune(ours)
    theirs, rows = load_theirs(cfg.gguf, dtype, cfg.device), []
    for cache in cfg.caches:
        tokens = torch.randint(1000, 40_000, (cache,), device=cfg.device)
        for sessions in cfg.sessions:
            row = {
                "cache": cache,
                "sessions": sessions,
                "ours_ms": 1e3 * time_ours(ours, tokens, sessions, cfg.steps)[0],
                "transformers_ms": 1e3 * time_theirs(theirs, tokens, sessions, cfg.steps)[0],
            }
            rows.append(row | {"ratio": row["transformers_ms"] / row["ours_ms"]})
            print(json.dumps(rows[-1]), flush=True)
    if cfg.json:
        report = {"transformers": transformers.__version__, "torch": torch.__version__}
        report |= {"dtype": cfg.dtype, "device": cfg.device, "threads": cfg.threads}
        cfg.json.write_text(json.dumps(report | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
