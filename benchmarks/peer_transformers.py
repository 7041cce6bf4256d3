"""Decode speed of `transformers` with its own cache on the same weights, beside ours.

    PYTHONPATH=. python benchmarks/peer_transformers.py --gguf data/smollm2/FILE.gguf --caches 256 1024

`generate` keeps every token (DynamicCache), so this is its speed where its context has grown to the
size of our cache; later it is slower, and beyond the trained context wrong.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from models.sink_lm.modes import Mode, seconds_per_token
from models.sink_lm.weights import load_model


@dataclass(frozen=True, kw_only=True)
class Config:
    gguf: Path
    caches: tuple[int, ...] = (256, 1024)
    steps: int = 24
    threads: int = 1


def load_theirs(gguf: Path) -> transformers.PreTrainedModel:
    config = load_gguf_checkpoint(str(gguf))["config"]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    state = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval()


class Clock(transformers.LogitsProcessor):
    """Notes when each token's logits are ready."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def time_theirs(model: transformers.PreTrainedModel, cache: int, steps: int) -> float:
    clock = Clock()
    model.generate(
        torch.randint(1000, 40_000, (1, cache)),
        attention_mask=torch.ones(1, cache, dtype=torch.long),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        logits_processor=[clock],
    )
    gaps = [later - now for now, later in zip(clock.times[1:-1], clock.times[2:], strict=True)]
    return statistics.median(gaps)


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    ours, theirs = load_model(str(cfg.gguf)), load_theirs(cfg.gguf)
    for cache in cfg.caches:
        tokens = torch.randint(1000, 40_000, (cache + 64,))
        mode = Mode(name="sink", cache=cache, sinks=4)
        row = {
            "cache": cache,
            "ours_ms": 1e3 * seconds_per_token(ours, tokens, mode, steps=cfg.steps),
            "transformers_ms": 1e3 * time_theirs(theirs, cache, cfg.steps),
        }
        print(json.dumps(row | {"ratio": row["transformers_ms"] / row["ours_ms"]}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
