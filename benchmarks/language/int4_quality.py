"""What 4-bit weights cost: logits and perplexity against float32 and against llama.cpp.

    PYTHONPATH=. python benchmarks/language/int4_quality.py --model data/smollm2 \
        --text english.txt --peer-python peers/bin/python

All read the same GGUF file; float32 multiplies by its weights exactly. First one stream of
`--tokens` tokens through a cache of 4 + 252: perplexity, the largest difference of a logit, and how
often the likeliest token is the same. int4 multiplies with its 4-bit weights throughout: torch's
operator in chunks, the own kernels token by token, as they decode. Its other way, for many rows, is
bf16's. Then passages of 512 tokens from an empty context, of which the second half counts, beside
llama.cpp.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from models.sink_lm.checkpoints.checkpoint import locate
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.checkpoints.tokenizer import load_tokenizer
from models.sink_lm.dtype_names import KernelsName
from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.int4 import INT4, Int4Linear
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.tuning import tune

SINKS, CACHE, CHUNK, PASSAGE = 4, 256, 256, 512


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    text: Path
    tokens: int = 20_480
    passages: int = 8
    peer_python: Path | None = None
    """Python of an environment with xllamacpp; None leaves llama.cpp out."""
    ways: tuple[str, ...] = ("bf16", "int4, torch", "int4, native")
    """What is compared with float32."""
    threads: int = 1


WAYS: dict[str, tuple[torch.dtype, KernelsName]] = {
    "bf16": (torch.bfloat16, "auto"),
    "int4, torch": (INT4, "torch"),
    "int4, native": (INT4, "native"),
}


def models(cfg: Config) -> Iterator[tuple[str, Llama]]:
    """The ways to read the file beside float32."""
    for name in cfg.ways:
        dtype, kernels = WAYS[name]
        model = load_model(cfg.model, dtype=dtype, kernels=kernels)
        tune(model)
        for module in model.modules():
            if isinstance(module, Int4Linear):
                module.few_rows = 10**9
        yield name, model


def stream(model: Llama, tokens_T: Tensor) -> Iterator[Tensor]:
    """Logits of one stream, a chunk at a time."""
    slabs = model.slabs(sessions=1, capacity=CACHE + 1)
    slot = slabs.allocate(SINKS)
    for part_T in tokens_T.split(CHUNK):
        yield read(model, part_T, slabs, slot)


def read(model: Llama, tokens_T: Tensor, slabs: Slabs, slot: int) -> Tensor:
    """Logits after every token."""
    if model.decode_step is not None:
        return torch.cat([model.decode(token, slabs, [slot]) for token in tokens_T.split(1)])
    logits_TV = model.prefill(tokens_T, slabs, slot, logits="all")
    assert logits_TV is not None
    return logits_TV


def compare(exact: Llama, others: dict[str, Llama], tokens_T: Tensor) -> list[dict[str, object]]:
    """One row per model: perplexity, and how far its logits are from those of `exact`."""
    found = {name: {"loss": 0.0, "largest": 0.0, "same": 0} for name in others | {"fp32": exact}}
    labels = tokens_T[1:].split(CHUNK)
    streams = {name: stream(model, tokens_T[:-1]) for name, model in others.items()}
    for expected_TV, labels_T in zip(stream(exact, tokens_T[:-1]), labels, strict=True):
        rows = {"fp32": expected_TV} | {name: next(logits) for name, logits in streams.items()}
        for name, logits_TV in rows.items():
            row = found[name]
            row["loss"] += float(F.cross_entropy(logits_TV, labels_T, reduction="sum"))
            row["largest"] = max(row["largest"], float((logits_TV - expected_TV).abs().max()))
            row["same"] += int((logits_TV.argmax(-1) == expected_TV.argmax(-1)).sum())
    count = len(tokens_T) - 1
    return [
        {
            "weights": name,
            "tokens": count,
            "perplexity": math.exp(row["loss"] / count),
            "largest_difference": row["largest"],
            "greedy_agreement": row["same"] / count,
        }
        for name, row in found.items()
    ]


def passage_perplexity(model: Llama, passages: list[list[int]]) -> float:
    losses = []
    for passage in passages:
        slabs = model.slabs(sessions=1, capacity=PASSAGE)
        tokens_T, slot = torch.tensor(passage), slabs.allocate(0)
        logits_TV = read(model, tokens_T[:-1], slabs, slot)
        half = PASSAGE // 2
        losses.append(F.cross_entropy(logits_TV[half - 1 :], tokens_T[half:]))
    return math.exp(float(torch.stack(losses).mean()))


def peer_perplexity(cfg: Config, passages: list[list[int]]) -> float:
    script = Path(__file__).with_name("peer_llama_cpp.py")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "passages.json"
        path.write_text(json.dumps(passages))
        command = [str(cfg.peer_python), str(script), "--gguf", str(locate(cfg.model))]
        command += ["--passages", str(path), "--threads", str(cfg.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return math.exp(json.loads(done.stdout.splitlines()[-1])["mean_loss"])


@torch.inference_mode()
def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    tokenizer = load_tokenizer(cfg.model)
    text = cfg.text.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, bos=tokenizer.adds_bos)[: cfg.tokens]
    tokens_T = torch.tensor(ids)
    starts = range(0, len(ids) - PASSAGE, max(len(ids) // cfg.passages, PASSAGE))
    passages = [ids[start : start + PASSAGE] for start in starts][: cfg.passages]
    if cfg.peer_python:
        row = {"passages": len(passages), "llama.cpp": peer_perplexity(cfg, passages)}
        print(json.dumps(row), flush=True)
    exact = load_model(cfg.model)
    tune(exact)
    print(json.dumps({"fp32": passage_perplexity(exact, passages)}), flush=True)
    others = dict(models(cfg))
    for name, model in others.items():
        print(json.dumps({name: passage_perplexity(model, passages)}), flush=True)
    for row in compare(exact, others, tokens_T):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
