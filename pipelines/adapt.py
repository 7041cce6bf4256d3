"""Adapts a finished run's encoder to new footage without labels, as a new run.

    python -m pipelines.adapt --from runs/demo --data.train shards/new_hud

The old run is only read. The new one starts from all of its weights and trains on the new footage,
mixed with the old so that less is forgotten, at a lower rate and for fewer steps. With labelled old
footage (--probe.train, --probe.test) the job then tells what the old task lost: it reads the old
encoder's probes on the adapted encoder's features. All of it is in adapt.json in the run's folder.
Every setting of pretraining may be overridden. docs/adapting.md has the details.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Annotated, Any

if __name__ == "__main__" and not __package__:  # `python pipelines/adapt.py`, uninstalled
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import tyro
from rich.console import Console

from models.artifacts.alignment import Alignment, Origin, alignment_bytes
from pipelines.config.jobs import AdaptConfig, EvaluateConfig, OldProbesConfig
from pipelines.config.places import ReadPlace
from pipelines.config.train import PretrainConfig
from pipelines.dataset.rows import check_classes, load_samples
from pipelines.dataset.shards import Manifest, read_manifest
from pipelines.evaluation.drift import feature_drift, paired_alignment
from pipelines.evaluation.features import decode_all, extract_features, preprocessing_of
from pipelines.evaluation.input_sets import read_sets
from pipelines.evaluation.probes.replaced import ADAPTED, read_replaced, with_aligned
from pipelines.evaluation.report.adaptation import as_html, tables
from pipelines.evaluation.subject import Subject, load_subject, random_init, with_sampler
from pipelines.recipes.adapted import adapted
from pipelines.runs.finished import FinishedRun, find_finished
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import join_uri, open_uri, write_atomic
from pipelines.training.launch import PretrainResult, pretrain

RESULTS, REPORT, ALIGNMENT = "adapt.json", "adapt.html", "alignment.safetensors"
COMPARED_ROWS = 2000
"""Images or clips of each kind of footage whose features are compared without labels."""
Fitted = tuple[Alignment, Origin]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptFlags(AdaptConfig):
    """The flags that are not those of pretraining."""

    from_: Annotated[ReadPlace, tyro.conf.arg(name="from")]
    """Folder of the finished run, or one of its checkpoints. A run stands for its best
    checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """The whole command line."""

    adapt: Annotated[AdaptFlags, tyro.conf.arg(name="")]
    run: Annotated[PretrainConfig, tyro.conf.arg(name="")]


def adapt(
    cfg: AdaptConfig, old: FinishedRun, run: PretrainConfig, *, console: Console | None = None
) -> dict[str, Any]:
    """Trains the new run, compares its encoder with the old one, and writes adapt.json.

    Args:
        cfg: the job.
        old: the run to adapt.
        run: the new run, from `recipes.adapted` with the user's overrides.
        console: where progress and the table are printed; None for stdout.

    Returns:
        What adapt.json holds.

    Raises:
        ValueError: a flag is invalid; the message names it.
        CheckpointError: the new run exists and cannot be continued, or weights do not fit.
    """
    console, start = console or Console(), time.time()
    cfg, run = prepare(cfg), prepare(run)
    if join_uri(run.run.storage, run.run.name) == old.uri:
        raise ValueError(f"--run.name: {run.run.name} is the run to adapt; name another")
    manifests = check_probes(cfg.probe, old.config, run)
    result = pretrain(run, stream=console.file)
    compared, fitted = compare(
        _evaluation(cfg, old), result.best_checkpoint, run, manifests, console
    )
    results = {
        "from": {"checkpoint": old.checkpoint, "step": old.step},
        "run": result.run_uri,
        "checkpoint": result.best_checkpoint,
        "settings": json.loads(json.dumps(dataclasses.asdict(cfg))),
        **compared,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": round(time.time() - start, 1),
    }
    _write(result, results, fitted, console)
    return results


def check_probes(
    probe: OldProbesConfig, old: PretrainConfig, run: PretrainConfig
) -> list[Manifest]:
    """Reads the manifests of the labelled sets, before anything is trained.

    Raises:
        ValueError: they cannot be probed, or the new encoder cannot stand in for the old one.
    """
    uris = {"train": probe.train, "test": probe.test, "new": probe.new}
    sets = {f"--probe.{name}": read_manifest(uri) for name, uri in uris.items() if uri}
    if not sets:
        return []
    for flag, manifest in sets.items():
        if manifest.modality != old.modality:
            raise ValueError(f"{flag}: holds {manifest.modality}s, --from learned {old.modality}s")
    if probe.state is None or probe.only is not None:
        first, *others = sets.items()
        for other in others:
            check_classes(dict((first, other)))
    if preprocessing_of(old.model) != preprocessing_of(run.model) or old.clip != run.clip:
        raise ValueError(
            "--probe.train: the old probes need features of the same pixels; leave --model.* and "
            "--clip.* as they were, or leave the probes out"
        )
    return list(sets.values())


def compare(
    cfg: EvaluateConfig,
    checkpoint: str,
    run: PretrainConfig,
    manifests: list[Manifest],
    console: Console,
) -> tuple[dict[str, Any], Fitted | None]:
    """Compares the adapted encoder with the old one.

    Args:
        cfg: the old encoder in `checkpoint`, the labelled sets, and settings of the probes.
        checkpoint: of the adapted encoder.
        run: the run that adapted it.
        manifests: of the labelled sets; empty if there are none.
        console: where the progress is shown.

    Returns:
        What adapt.json holds: `drift`, by kind of footage, and `probes`, what `read_replaced`
        returns, where there are labelled sets. And the alignment, where there is old footage.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old, new = load_subject(cfg.checkpoint), load_subject(checkpoint)
    for subject in (old, new):
        subject.encoder.to(device)
    footage = {"new_footage": run.data.train}
    if run.data.mix:
        footage["old_footage"] = run.data.mix[0]
    features = {name: _features(uri, old, new) for name, uri in footage.items()}
    found: dict[str, Any] = {"drift": {key: feature_drift(*both) for key, both in features.items()}}
    fitted = None
    if "old_footage" in features:
        fitted = _alignment(new, *features["old_footage"])
    if not manifests:
        return found, fitted
    old = with_sampler(cfg, old, manifests[0].modality)
    baseline = random_init(old.encoder, cfg.seed).to(device)
    sets, _ = read_sets(cfg, old, baseline, manifests, console, {ADAPTED: new.encoder})
    if fitted is not None:
        sets = [with_aligned(part, fitted[0]) for part in sets]
    with console.status("reading the old probes on the adapted encoder"):
        found["probes"] = read_replaced(sets, cfg, old.encoder.heads)
    return found, fitted


def _alignment(new: Subject, before_ND: np.ndarray, after_ND: np.ndarray) -> Fitted:
    """Fits the way back from the adapted encoder's features to the old one's."""
    origin = Origin.of(
        new.encoder,
        new.preprocessing,
        how="paired",
        name=new.name,
        clip=new.clip,
        samples={"old": len(before_ND)},
    )
    return paired_alignment(after_ND, before_ND), origin


def _features(uri: str, old: Subject, new: Subject) -> list[np.ndarray]:
    """Pooled features [N, D] of the same samples by both encoders."""
    table = load_samples(uri, COMPARED_ROWS)
    features = []
    for subject in (old, new):
        pixels = decode_all(table, subject.preprocessing, subject.sampler)
        features.append(extract_features(subject.encoder, subject.preprocessing, pixels))
    return features


def _evaluation(cfg: AdaptConfig, old: FinishedRun) -> EvaluateConfig:
    """The settings with which evaluate would probe the old encoder."""
    probe = cfg.probe
    return EvaluateConfig(
        checkpoint=old.checkpoint,
        data=probe.train or "",
        test=probe.test or "",
        shift_test=probe.new,
        only=probe.only,
        state=probe.state,
        columns=probe.columns,
        bins=probe.bins,
        limit=probe.limit,
        attentive_epochs=probe.attentive_epochs,
    )


def _write(
    result: PretrainResult, results: dict[str, Any], fitted: Fitted | None, console: Console
) -> None:
    for table in tables(results):
        console.print(table)
    fs, path = open_uri(result.run_uri)
    write_atomic(fs, f"{path}/{RESULTS}", json.dumps(results, indent=2).encode())
    if fitted is not None:
        write_atomic(fs, f"{path}/{ALIGNMENT}", alignment_bytes(*fitted))
    write_atomic(fs, f"{path}/{REPORT}", as_html(results).encode())
    console.print(f"run {result.run_uri} at step {result.step}", markup=False, highlight=False)
    console.print(f"best checkpoint {result.best_checkpoint}", markup=False, highlight=False)
    console.print(f"report: {join_uri(result.run_uri, REPORT)}", markup=False, highlight=False)


def parse(arguments: list[str]) -> tuple[AdaptConfig, FinishedRun, PretrainConfig]:
    """Parses the command line, in two steps: the defaults of the run's flags are in `--from`.

    Raises:
        CheckpointError: --from names no finished run.
    """
    if {"-h", "--help"} & set(arguments):
        tyro.cli(Command, args=arguments, description=__doc__)
    flags, rest = tyro.cli(
        AdaptFlags, args=arguments, description=__doc__, return_unknown_args=True
    )
    flags = prepare(flags)
    old = find_finished(flags.from_, "--from")
    recipe = adapted(old.config, old.checkpoint, old.uri.rpartition("/")[0], flags)
    return flags, old, tyro.cli(PretrainConfig, args=rest, default=recipe)


def main() -> None:
    """Parses the command line, trains, compares, and prints where the results are."""
    run_command(
        lambda: parse(sys.argv[1:]),
        lambda command: adapt(*command),
        configs=lambda command: (command[0], command[2]),
    )


if __name__ == "__main__":
    main()
