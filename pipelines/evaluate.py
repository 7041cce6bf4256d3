"""Measures what an encoder learned: probes beside their baselines, a table and an HTML report.

    python -m pipelines.evaluate --checkpoint runs/demo --data shards/train --test shards/test

The job writes OUT/results.json and OUT/report.html. An accuracy alone says little, so every number
stands beside the same probe on a randomly initialised encoder of the same shape and on raw pixels.
Clips also get an attentive probe and a third baseline, the encoder on their middle frame alone.
docs/evaluation.md states the protocol of each number.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

# Lets `python pipelines/evaluate.py` run from an uninstalled checkout, as `ray job submit` does.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from models.artifacts.alignment import Alignment, load_alignment
from models.encoders.vit import VisionTransformer
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.aspects import fit_notes
from pipelines.dataset.rows import read_places
from pipelines.dataset.shards import Manifest
from pipelines.evaluation.beliefs.study import (
    LEARNED,
    MEASURED,
    PASSES,
    Study,
    check_subject,
    study,
)
from pipelines.evaluation.blocks.choice import (
    choose_blocks,
    chosen_encoders,
    with_chosen_blocks,
)
from pipelines.evaluation.features import decode_all
from pipelines.evaluation.input_sets import read_manifests, read_sets
from pipelines.evaluation.near_duplicates import near_duplicate_notes
from pipelines.evaluation.probe_sets import SETS, ProbeSet, number_set
from pipelines.evaluation.probes.probe import ProbeTask, Readouts
from pipelines.evaluation.probes.registry import best_score, run_probes
from pipelines.evaluation.probes.replaced import with_aligned_shift
from pipelines.evaluation.report.block_scores import block_table, draw_blocks
from pipelines.evaluation.report.comparison import read_compared
from pipelines.evaluation.report.page import write_report
from pipelines.evaluation.report.tables import ROW_NAMES, comparison_tables, results_tables
from pipelines.evaluation.subject import Subject, load_subject, random_init, with_sampler
from pipelines.evaluation.supervised import supervised_baseline
from pipelines.evaluation.validity import facts_of, task_of, validity_warnings
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import open_uri, write_atomic

PACKAGES = ("torch", "timm", "numpy", "pyarrow")
"""Packages whose versions results.json names."""


def evaluate(cfg: EvaluateConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Evaluates an encoder; writes results.json and report.html under `cfg.out`.

    Args:
        cfg: the job.
        console: where progress and the tables are printed; None for stdout.

    Returns:
        What results.json holds: `rows` (the encoder and its baselines, each with what
        `probes.registry.run_probes` measures), with --layers all `blocks` (`blocks.choice.Blocks`),
        for clips `task` (`validity.task_of`), with --decode-steps `beliefs`
        (`beliefs.study.Study`), provenance, settings, data, versions, and `warnings`: reasons why
        the accuracies may mean nothing.

    Raises:
        ValueError: there is no such encoder, a set has no labels, or the sets differ in classes.
    """
    console, start = console or Console(), time.time()
    cfg = prepare(cfg)
    manifests = read_manifests(cfg)
    compared = read_compared(cfg, manifests)
    subject = with_sampler(cfg, load_subject(cfg.checkpoint), manifests[0].modality)
    alignment = _alignment(cfg, subject)
    if cfg.decode_steps:
        check_subject(subject, "--decode-steps")
    for note in _fit_notes(cfg, subject, manifests):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    subject.encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    baseline = untrained(subject, cfg.seed)
    encoders = {"encoder": subject.encoder, "random_init": baseline}
    blocks = choose_blocks(cfg, subject, encoders, manifests, console) if cfg.all_blocks else None
    others = chosen_encoders(blocks, encoders) if blocks else {}
    sets, classes = read_sets(cfg, subject, baseline, manifests, console, others)
    if alignment is not None:
        sets = with_aligned_shift(sets, alignment)
    readouts: Readouts = {}
    measured = measure(subject, sets, cfg, console, readouts)
    beliefs = _beliefs(subject, sets, cfg, console) if cfg.decode_steps else None
    if beliefs:
        measured["beliefs"] = beliefs.results
    if blocks:
        measured["rows"] = with_chosen_blocks(measured["rows"], blocks)
        measured["blocks"] = dataclasses.asdict(blocks)
    results = measured | {
        "provenance": subject.provenance,
        "settings": json.loads(json.dumps(dataclasses.asdict(cfg))),  # as the file will have it
        "data": data_used(manifests, sets),
        "classes": classes,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": round(time.time() - start, 1),
    }
    if (still := results["rows"].get("single_frame")) and cfg.has_classes:
        results["task"] = task_of(best_score(still), sets[1].labels_N)
    all_rows = all(flag is None for flag in (cfg.limit, cfg.state, cfg.only)) and not cfg.number
    facts = facts_of(manifests, sets, all_rows=all_rows)
    results["warnings"] = validity_warnings(facts, classes if cfg.has_classes else None)
    show(results, compared, console)
    _write(cfg.out, "results.json", json.dumps(results, indent=2).encode())
    html = write_report(results, subject, sets[0], sets[1], baseline, compared, readouts, beliefs)
    console.print(f"report: {_write(cfg.out, 'report.html', html.encode())}")
    return results


def _alignment(cfg: EvaluateConfig, subject: Subject) -> Alignment | None:
    """Reads --align; raises a ValueError if it is not for the features of this evaluation."""
    if cfg.align is None:
        return None
    stored = load_alignment(cfg.align)
    if stored.origin.how == "paired":
        raise ValueError(
            f"--align: {cfg.align} maps an adapted encoder's features to those of the old one,\n"
            "whose probes evaluate does not have. adapt --probe.train reads them; here goes a file "
            "of pipelines.align."
        )
    stored.check(subject.encoder, subject.preprocessing)
    stored.check_clips(subject.clip)
    return stored.alignment


def _fit_notes(cfg: EvaluateConfig, subject: Subject, manifests: Sequence[Manifest]) -> list[str]:
    uris = {"--data": cfg.data, "--test": cfg.test, "--shift-test": cfg.shift_test}
    named = [(flag, uri) for flag, uri in uris.items() if uri is not None]
    sets = [(*one, manifest) for one, manifest in zip(named, manifests, strict=True)]
    return fit_notes(sets, subject.preprocessing.fit, subject.preprocessing.image_size)


def untrained(subject: Subject, seed: int) -> VisionTransformer:
    """Builds an untrained encoder of the subject's shape, on the subject's device."""
    return random_init(subject.encoder, seed).to(next(subject.encoder.parameters()).device)


def measure(
    subject: Subject,
    sets: Sequence[ProbeSet],
    cfg: EvaluateConfig,
    console: Console,
    readouts: Readouts,
) -> dict[str, Any]:
    """Runs every probe on every row, and the supervised baseline where it is asked for.

    Args:
        subject: the encoder.
        sets: in the order of `probe_sets.SETS`.
        cfg: the job.
        console: where the progress is printed.
        readouts: takes the fitted probes of the encoder's row.

    Returns:
        `rows` of results.json, and `supervised` where there is one.
    """
    train, test, shifted = [*sets, None][:3]
    assert train is not None
    assert test is not None
    found: dict[str, Any] = {"rows": {}}
    # Every row is the same task on other features.
    first = ProbeTask(
        row="encoder",
        train=train,
        test=test,
        shifted=shifted,
        cfg=cfg,
        heads=subject.encoder.heads,
    )
    with console.status("probing") as status:
        for row in train.features:
            status.update(f"probing {ROW_NAMES[row]}")
            fitted = readouts if row == "encoder" else {}
            found["rows"][row] = run_probes(dataclasses.replace(first, row=row, readouts=fitted))
        if cfg.supervised_epochs > 0:
            status.update("training the supervised baseline")
            found["supervised"] = _supervised(subject, sets, cfg)
    return found


def data_used(manifests: Sequence[Manifest], sets: Sequence[ProbeSet]) -> dict[str, Any]:
    """Returns every set's manifest hash, and how many of its samples were used and left out."""
    found: dict[str, Any] = {}
    for name, manifest, part in zip(SETS, manifests, sets, strict=False):
        count = len(part.labels_N)
        found[name] = {"manifest_hash": manifest.manifest_hash, f"{manifest.modality}s": count}
        if part.duplicates is not None:
            found[name]["near_duplicates"] = part.duplicates
        lost = {number: number_set(part, number).left_out for number in part.numbers}
        if lost:
            found[name]["numbers"] = {
                number: {"used": count - out, "left_out": out} for number, out in lost.items()
            }
    return found


def versions() -> dict[str, str]:
    """Returns the versions of Python and of `PACKAGES`."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | found


def show(results: dict[str, Any], compared: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the table of results, what was left out, the warnings, and the comparison."""
    console.print(*results_tables(results), sep="\n")
    if blocks := block_table(results):
        console.print(draw_blocks(blocks))
    for note in near_duplicate_notes(results["data"]):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", markup=False, highlight=False, style="yellow")
    if compared:
        console.print(*comparison_tables(results, compared), sep="\n")


def _beliefs(
    subject: Subject, sets: Sequence[ProbeSet], cfg: EvaluateConfig, console: Console
) -> Study:
    """Draws and measures what the run's predictor expects, on samples of --data and --test."""

    def read(part: ProbeSet, most: int) -> torch.Tensor:
        # At equal distances, because a set may be in the order of its classes.
        count = len(part.places_N3)
        rows = np.linspace(0, count - 1, min(count, most)).astype(np.int64)
        table = read_places(part.uri, part.places_N3[rows])
        return decode_all(table, subject.preprocessing, subject.sampler).pixels

    pixels = [read(part, most) for part, most in zip(sets, (LEARNED, MEASURED), strict=False)]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training decoders", total=PASSES * cfg.decode_steps)
        return study(
            subject,
            *pixels,
            steps=cfg.decode_steps,
            seed=cfg.seed,
            advance=lambda: progress.advance(task),
        )


def _supervised(subject: Subject, sets: Sequence[ProbeSet], cfg: EvaluateConfig) -> dict[str, Any]:
    parts = [(part.pixels, part.labels_N) for part in sets if part.pixels is not None]
    found = supervised_baseline(
        untrained(subject, cfg.seed),
        subject.preprocessing,
        *parts,
        epochs=cfg.supervised_epochs,
        seed=cfg.seed,
    )
    return dataclasses.asdict(found)


def _write(out: str, name: str, data: bytes) -> str:
    fs, path = open_uri(out)
    write_atomic(fs, f"{path}/{name}", data)
    return f"{out.rstrip('/')}/{name}"


def main() -> None:
    """Entry point of `python -m pipelines.evaluate`."""
    run_command(lambda: tyro.cli(EvaluateConfig, description=__doc__), evaluate)


if __name__ == "__main__":
    main()
