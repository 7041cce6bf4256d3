"""Draws what a run's predictor expects, and measures how much of that is true.

    python -m pipelines.decode --checkpoint runs/demo --data shards/train --test shards/test

The job trains decoders from frozen tokens to pixels and writes OUT/results.json, OUT/report.html
and OUT/decoder.safetensors. No labels are needed. Every picture stands beside numbers: what is
drawn is encoded again and looked for among all test samples, beside the same with tokens of other
samples and with random weights. Of a world model it draws what it imagines beside what happened.
docs/beliefs.md says how to read them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# Lets `python pipelines/decode.py` run from an uninstalled checkout, as `ray job submit` does.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from models.objectives.objective import Objective
from models.planning.world_model.world_model import WorldModel
from models.scratch import scratch
from models.tensor_files import METADATA, detached, save_tensors
from pipelines.config.checks import require, require_seed
from pipelines.config.places import ReadPlace, WrittenPlace
from pipelines.config.train import PretrainConfig
from pipelines.dataset.rows import load_samples
from pipelines.dataset.shards import read_manifest
from pipelines.evaluation.beliefs.rollouts import FRAMES, rollout_study
from pipelines.evaluation.beliefs.study import PASSES, check_subject, study
from pipelines.evaluation.features import decode_all, preprocessing_of
from pipelines.evaluation.report.beliefs import belief_lines, belief_section, page
from pipelines.evaluation.report.rollouts import rollout_lines, rollout_section
from pipelines.evaluation.subject import load_subject
from pipelines.loading.actions import ActionError, action_reader
from pipelines.loading.clips import ClipSampler
from pipelines.runs.checkpoints import CheckpointError, load_objective
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import open_uri, write_atomic

LEAST = 2
"""Images or clips of --test: one alone is always found first."""
RANKS = "ranks need others"


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Draws and measures what a run's predictor expects behind masks."""

    checkpoint: ReadPlace
    """Checkpoint of a run of ijepa, vjepa, dmjd or worldmodel. A run folder stands for its best
    checkpoint."""
    data: ReadPlace
    """Shards that the decoders learn from; labels are not read."""
    test: ReadPlace
    """Shards that are drawn and measured."""
    out: WrittenPlace = "beliefs"
    """Folder for results.json, report.html and decoder.safetensors."""
    steps: int = 1500
    """Optimizer steps of every decoder."""
    limit: int = 4000
    """Use at most this many images or clips of --data."""
    test_limit: int = 1000
    """Use at most this many images or clips of --test; ranks are among these."""
    seed: int = 0
    """Seed of the decoders, of the random weights, and of samples."""

    def __post_init__(self) -> None:
        for flag in ("steps", "limit"):
            require(getattr(self, flag) > 0, flag, "must be positive")
        require(self.test_limit >= LEAST, "test-limit", f"must be at least {LEAST}: {RANKS}")
        require_seed(self.seed)


def decode(cfg: DecodeConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Draws and measures, and writes the results.

    Returns:
        What results.json holds: `beliefs` (`evaluation.beliefs.study.Study.results`) or, of a world
        model, `rollouts` (`evaluation.beliefs.rollouts.Rollouts.results`); provenance, settings
        and date.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not load.
        ValueError: its objective predicts nothing that can be drawn, or a set does not fit.
    """
    console, start = console or Console(), time.time()
    cfg = prepare(cfg)
    objective, config, info = _load(cfg.checkpoint)
    drawn = of_world_model if isinstance(objective, WorldModel) else of_predictor
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training decoders", total=None)

        def begin(total: int) -> Callable[[], None]:
            progress.update(task, total=total)
            return lambda: progress.advance(task)

        found = drawn(cfg, objective, config, begin)
    results = {
        found.kind: found.results,
        "provenance": {"run": config.run.name, "step": info["step"], "checkpoint": info["name"]},
        "settings": json.loads(json.dumps(dataclasses.asdict(cfg))),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": round(time.time() - start, 1),
    }
    for line in found.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _write(cfg.out, results, page(found.kind, results, found.section, found.noun), found.decoders)
    console.print(f"report: {cfg.out.rstrip('/')}/report.html")
    return results


def _load(uri: str) -> tuple[Objective, PretrainConfig, dict[str, Any]]:
    """Loads the whole objective of a run, frozen."""
    try:
        objective, config, info = load_objective(uri)
    except CheckpointError:
        check_subject(load_subject(uri))  # an artifact is told what it lacks
        raise
    name = str(info["uri"]).rstrip("/").rpartition("/")[2]
    return objective.eval().requires_grad_(False), config, info | {"name": name}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a kind of run has to show."""

    kind: Literal["beliefs", "rollouts"]
    noun: str
    results: dict[str, Any]
    section: dict[str, Any]
    """For the template of this kind."""
    lines: list[str]
    """For the terminal."""
    decoders: dict[str, nn.Module]


Begin = Callable[[int], Callable[[], None]]
"""Is told the number of steps that will come; what it returns is called after each."""


def of_predictor(
    cfg: DecodeConfig, objective: Objective, config: PretrainConfig, begin: Begin
) -> Drawn:
    """Draws what a predictor expects behind masks."""
    subject = load_subject(cfg.checkpoint)
    check_subject(subject)
    train, test = (
        decode_all(rows, subject.preprocessing, subject.sampler).pixels
        for rows in _rows(cfg, config)
    )
    if len(test) < LEAST:
        raise ValueError(f"--test: {cfg.test} holds a single {config.modality}; {RANKS}")
    subject.encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    advance = begin(PASSES * cfg.steps)
    found = study(subject, train, test, steps=cfg.steps, seed=cfg.seed, advance=advance)
    fitted = found.scenes["encoder"].decoders
    assert fitted.flow is not None
    return Drawn(
        kind="beliefs",
        noun="clip" if subject.sampler else "image",
        results=found.results,
        section=belief_section(found),
        lines=belief_lines(found.results),
        decoders={"regression": fitted.regression, "flow": fitted.flow},
    )


def of_world_model(
    cfg: DecodeConfig, objective: Objective, config: PretrainConfig, begin: Begin
) -> Drawn:
    """Draws what a world model imagines."""
    assert isinstance(objective, WorldModel)
    frames = FRAMES - 1 + objective.history
    sampler, prep = ClipSampler(frames=frames, settings=config.clip), preprocessing_of(config.model)
    train_rows, test_rows = _rows(cfg, config, beside=("actions",))
    actions_NTA = _actions(config, test_rows, sampler)
    long = ~actions_NTA.isnan().flatten(1).any(1)
    if long.sum() < LEAST:
        raise ValueError(
            f"--test: {int(long.sum())} of the {len(long)} segments read of {cfg.test} have the "
            f"{frames} frames of a clip.\nRanks need {LEAST}: give longer videos, or more."
        )
    train, test = (decode_all(rows, prep, sampler).pixels for rows in (train_rows, test_rows))
    advance = begin(cfg.steps)
    found = rollout_study(
        objective,
        train,
        test[long],
        actions_NTA[long],
        steps=cfg.steps,
        seed=cfg.seed,
        advance=advance,
    )
    return Drawn(
        kind="rollouts",
        noun="clip",
        results=found.results,
        section=rollout_section(found),
        lines=rollout_lines(found.results),
        decoders={"latent": found.decoder},
    )


def _actions(config: PretrainConfig, rows: pa.Table, sampler: ClipSampler) -> Tensor:
    """Returns what was done between the frames of clips, [N, T - 1, A]; NaN beyond a segment's end.

    Raises:
        ValueError: a segment has no actions, or others than the model takes.
    """
    reader = action_reader(config)
    assert reader is not None
    frames_NT = sampler.middle(rows["num_frames"].to_numpy(), rows["fps"].to_numpy())
    try:
        return torch.from_numpy(reader.between(rows, frames_NT))
    except ActionError as error:
        told = str(error).partition("\n")[0]
        way_out = f"Give walks of the world that {config.run.name} learned from."
        raise ValueError(f"--test: {told}\n{way_out}") from error


def _rows(
    cfg: DecodeConfig, config: PretrainConfig, *, beside: tuple[str, ...] = ()
) -> list[pa.Table]:
    """Reads the rows of --data and --test, with further columns if some are named.

    Raises:
        ValueError: a set is of another modality than the run's.
    """
    found = []
    for flag, uri, limit in (
        ("--data", cfg.data, cfg.limit),
        ("--test", cfg.test, cfg.test_limit),
    ):
        holds, wanted = read_manifest(uri).modality, config.modality
        if holds != wanted:
            raise ValueError(
                f"{flag}: {uri} holds {holds}s, but {config.run.name} learned from {wanted}s.\n"
                f"Give shards of {wanted}s."
            )
        found.append(load_samples(uri, limit, beside=beside))
    return found


def _write(out: str, results: dict[str, Any], html: str, decoders: dict[str, nn.Module]) -> None:
    fs, folder = open_uri(out)
    write_atomic(fs, f"{folder}/results.json", json.dumps(results, indent=2).encode())
    write_atomic(fs, f"{folder}/report.html", html.encode())
    tensors = {
        f"{name}.{key}": value
        for name, decoder in decoders.items()
        for key, value in detached(decoder).items()
    }
    with scratch("decode") as local:
        file = local / "decoder.safetensors"
        save_tensors(tensors, file, METADATA)
        write_atomic(fs, f"{folder}/{file.name}", file.read_bytes())


def main() -> None:
    """Entry point of `python -m pipelines.decode`."""
    run_command(lambda: tyro.cli(DecodeConfig, description=__doc__), decode)


if __name__ == "__main__":
    main()
