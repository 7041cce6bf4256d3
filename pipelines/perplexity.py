"""Perplexity, speed and memory of a language model on one long text, by attention mode.

    python -m pipelines.perplexity --model data/smollm2 --text data/mobydick.txt \
        --sinks 0,1,2,4,8 --cache 256,1024 --max-tokens 20000 --json out.json

The protocol is that of section 4 of Xiao et al. 2023: the text is one uninterrupted stream, and
perplexity is exp of the mean negative log-likelihood. 0 sinks are the window baseline. `--dense`
adds full attention over the whole text. `--recompute-samples` adds the sliding window with
re-computation at evenly spread places, because it reads a whole window per token; the other modes'
perplexity at the same places is shown beside it.

Legend: T tokens of the text, N sampled places.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

# Lets `python pipelines/perplexity.py` work from an uninstalled checkout.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from models.sink_lm.dtype_names import DTypeName
from models.sink_lm.modes import Mode, recomputed_losses, seconds_per_token, stream_losses
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.tuning import tune
from pipelines.config.places import PlaceField
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """Settings of a perplexity measurement."""

    model: Annotated[str, PlaceField(or_name=True)]
    """Hugging Face folder or hub id, or a GGUF file."""
    text: Annotated[Path, PlaceField()]
    """UTF-8 text, read as one stream."""
    sinks: str = "0,4"
    """Numbers of sink tokens, comma-separated; 0 is the window baseline."""
    cache: str = "256"
    """Cache sizes in tokens, sinks included, comma-separated."""
    max_tokens: int = 20_000
    """Read no more of the text than this."""
    dense: bool = False
    """Also read with full attention, beyond the trained context if the text is longer."""
    recompute_samples: int = 0
    """Also recompute the window for this many tokens, evenly spread after the largest cache."""
    chunk: int = 256
    """Tokens read at once. It changes the speed, but not the result."""
    dtype: DTypeName = "fp32"
    """Type of weights, keys and values. int8 rounds the linear layers, int4 keeps those of a GGUF
    file in the bits that they have, and both leave the rest bf16; auto takes the fastest."""
    device: str = "cpu"
    """Device to compute on."""
    threads: int | None = None
    """Torch threads; None leaves torch's choice."""
    json: Annotated[Path, PlaceField(written=True, file=True)] | None = None
    """Write the rows to this file, and the plot beside it as .png."""

    def __post_init__(self) -> None:
        """Checks the lists.

        Raises:
            ValueError: names the flag at fault.
        """
        caches, sinks = numbers("--cache", self.cache), numbers("--sinks", self.sinks)
        if min(caches) < 2:
            raise ValueError("--cache must be at least 2")
        if max(sinks) >= min(caches):
            raise ValueError(f"--sinks {max(sinks)} leaves no window in --cache {min(caches)}")
        if self.max_tokens <= max(caches):
            raise ValueError(f"--max-tokens {self.max_tokens} never fills --cache {max(caches)}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    mode: str
    sinks: int
    cache: int
    perplexity: float
    """Perplexity over the whole text; for `recompute` over the sampled places."""
    perplexity_sampled: float | None
    """Perplexity over the sampled places."""
    decode_tokens_per_s: float
    cache_mib: float


def numbers(flag: str, text: str) -> list[int]:
    """Parses a comma-separated list of whole numbers.

    Raises:
        ValueError: names the flag.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r}: whole numbers separated by commas") from None
    if min(found) < 0:
        raise ValueError(f"{flag} {text!r}: numbers from 0")
    return found


def modes(cfg: PerplexityConfig, tokens: int) -> list[Mode]:
    """Returns the modes that the settings ask for."""
    found = [Mode(name="dense", cache=tokens)] if cfg.dense else []
    for cache in numbers("--cache", cfg.cache):
        for sinks in numbers("--sinks", cfg.sinks):
            found.append(Mode(name="sink" if sinks else "window", cache=cache, sinks=sinks))
        if cfg.recompute_samples:
            found.append(Mode(name="recompute", cache=cache))
    return found


def sampled_places(cfg: PerplexityConfig, tokens: int) -> Tensor:
    """Returns N token indices, spread evenly over the part where every cache is full."""
    first = max(numbers("--cache", cfg.cache)) + 1
    return torch.linspace(first, tokens - 1, cfg.recompute_samples).long()


def measure(
    model: Llama, tokens_T: Tensor, mode: Mode, cfg: PerplexityConfig, progress: Progress
) -> tuple[Row, Tensor]:
    """Reads the text in one mode.

    Returns:
        The row, and the losses in nats ([T - 1], or [N] for `recompute`).
    """
    places_N = sampled_places(cfg, len(tokens_T))
    if mode.name == "recompute":
        found: Iterator[Tensor] = (
            loss[None] for loss in recomputed_losses(model, tokens_T, places_N, cache=mode.cache)
        )
        total = len(places_N)
    else:
        found, total = stream_losses(model, tokens_T, mode, chunk=cfg.chunk), len(tokens_T) - 1
    task = progress.add_task(f"{mode.name} {mode.sinks}+{mode.cache - mode.sinks}", total=total)
    parts = []
    for part in found:
        parts.append(part)
        progress.advance(task, len(part))
    losses = torch.cat(parts)
    sampled = losses if mode.name == "recompute" else losses[places_N - 1]
    row = Row(
        mode=mode.name,
        sinks=mode.sinks,
        cache=mode.cache,
        perplexity=math.exp(losses.mean()),
        perplexity_sampled=math.exp(sampled.mean()) if len(sampled) else None,
        decode_tokens_per_s=1 / seconds_per_token(model, tokens_T, mode),
        cache_mib=mode.slabs(model).bytes_per_session / 2**20,
    )
    return row, losses


def perplexity(cfg: PerplexityConfig) -> list[Row]:
    """Runs every mode, prints the table and writes the results.

    Raises:
        ValueError: the text is shorter than the cache.
    """
    from models.sink_lm.checkpoints.dtypes import dtype_of
    from models.sink_lm.checkpoints.loading import load_model
    from models.sink_lm.checkpoints.tokenizer import load_tokenizer

    cfg = prepare(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    tokenizer = load_tokenizer(cfg.model)
    ids = tokenizer.encode(cfg.text.read_text(encoding="utf-8"), bos=tokenizer.adds_bos)
    tokens_T = torch.tensor(ids[: cfg.max_tokens])
    if len(tokens_T) <= max(numbers("--cache", cfg.cache)):
        raise ValueError(f"--text {cfg.text} has {len(tokens_T)} tokens, fewer than --cache")
    dtype = dtype_of(cfg.dtype, cfg.model, cfg.device)
    model = load_model(cfg.model, dtype=dtype, device=cfg.device)
    tune(model)
    rows, curves = [], {}
    with Progress() as progress:
        for mode in modes(cfg, len(tokens_T)):
            row, losses = measure(model, tokens_T, mode, cfg, progress)
            rows.append(row)
            curves[f"{mode.name} {mode.sinks}+{mode.cache - mode.sinks}"] = losses
    print_table(rows)
    if cfg.json:
        write_results(cfg, rows, curves, len(tokens_T))
    return rows


def print_table(rows: list[Row]) -> None:
    """Prints the rows."""
    table = Table("mode", "sinks", "cache", "perplexity", "at sampled", "tokens/s", "cache MiB")
    for row in rows:
        sampled = "-" if row.perplexity_sampled is None else f"{row.perplexity_sampled:.2f}"
        speed, memory = f"{row.decode_tokens_per_s:.1f}", f"{row.cache_mib:.1f}"
        size = (str(row.sinks), str(row.cache))
        table.add_row(row.mode, *size, f"{row.perplexity:.2f}", sampled, speed, memory)
    Console().print(table)


def write_results(
    cfg: PerplexityConfig, rows: list[Row], curves: dict[str, Tensor], tokens: int
) -> None:
    """Writes the JSON and, beside it, a plot of the perplexity along the stream."""
    from matplotlib.figure import Figure

    assert cfg.json is not None
    settings = {key: str(value) for key, value in asdict(cfg).items()}
    report = {"config": settings, "tokens": tokens, "rows": [asdict(row) for row in rows]}
    cfg.json.parent.mkdir(parents=True, exist_ok=True)
    cfg.json.write_text(json.dumps(report, indent=2) + "\n")
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    width = max(tokens // 40, 1)
    for name, losses in curves.items():
        if not name.startswith("recompute"):
            means = [float(part.mean().exp()) for part in torch.split(losses, width)]
            axes.plot([width * (i + 0.5) for i in range(len(means))], means, label=name)
    axes.set(xlabel="tokens read", ylabel=f"perplexity of the last {width}", yscale="log")
    axes.legend(title="mode sinks+window", fontsize=8)
    figure.savefig(cfg.json.with_suffix(".png"), dpi=120)


def main() -> None:
    """Runs the command line."""
    import tyro

    run_command(lambda: tyro.cli(PerplexityConfig), perplexity)


if __name__ == "__main__":
    main()
