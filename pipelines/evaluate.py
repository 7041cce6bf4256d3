"""JOB 3: what did the encoder learn? Probes beside their baselines, a table and an HTML report.

    python -m pipelines.evaluate --checkpoint runs/demo --data shards/train --test shards/test

Writes OUT/results.json and OUT/report.html. Every number stands beside the same probe on a randomly
initialised encoder of the same shape and on raw pixels: an accuracy alone says nothing. Clips get an
attentive probe too, and a third baseline: the encoder shown their middle frame only, standing still.
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
from typing import Any

# Lets `python pipelines/evaluate.py` work from an uninstalled checkout, as `ray job submit` runs it.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from models.encoders.vit import VisionTransformer
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.rows import Wanted, check_classes
from pipelines.dataset.shards import Manifest, read_manifest
from pipelines.evaluation.attentive_probe import attentive_probe
from pipelines.evaluation.probe_sets import (
    SETS,
    Labels,
    ProbeSet,
    check_token_bytes,
    probe_featurizers,
    probe_set,
)
from pipelines.evaluation.probes import few_shot, knn_accuracy, linear_probe, task_of
from pipelines.evaluation.ranks import rankme
from pipelines.evaluation.report.comparison import comparison_table, read_compared
from pipelines.evaluation.report.page import NAMES, main_score, write_report
from pipelines.evaluation.state_labels import Bins, find_column, state_reader
from pipelines.evaluation.subject import Subject, load_subject, random_init, with_sampler
from pipelines.evaluation.supervised import supervised_baseline
from pipelines.evaluation.validity import facts_of, validity_warnings
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import open_uri, write_atomic

RANKME_ROWS = 10_000
PACKAGES = ("torch", "timm", "numpy", "pyarrow")


def evaluate(cfg: EvaluateConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Evaluates an encoder; writes results.json and report.html under `cfg.out`.

    Args:
        cfg: the job.
        console: where progress and the table go; None for stdout.

    Returns:
        What results.json holds: `rows` (per row of the table: knn, linear, few_shot_1pct,
        few_shot_10, rankme, of clips attentive), of clips `task` (`probes.task_of`), provenance,
        settings, data, versions, and `warnings`: why the accuracies may mean nothing.

    Raises:
        ValueError: sets without labels or with other classes than each other, or no such encoder.
    """
    console, start = console or Console(), time.time()
    cfg = prepare(cfg)
    manifests = _manifests(cfg)
    compared = read_compared(cfg, manifests)
    subject = with_sampler(cfg, load_subject(cfg.checkpoint), manifests[0].modality)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject.encoder.to(device)
    baseline = random_init(subject.encoder, cfg.seed).to(device)
    sets, classes = _probe_sets(cfg, subject, baseline, manifests, console)
    train, test, *shifted = sets
    rows = {}
    with console.status("probing") as status:
        for row in train.features:
            status.update(f"probing {NAMES[row]}")
            rows[row] = probe(train, test, row, cfg, *shifted)
            if row in train.tokens:
                heads = subject.encoder.heads
                rows[row]["attentive"] = _attentive(sets, row, heads, cfg)
        status.update("training the supervised baseline")
        supervised = _supervised(subject, sets, cfg)
    results = {
        "rows": rows,
        **({"supervised": supervised} if supervised else {}),
        "provenance": subject.provenance,
        "settings": json.loads(json.dumps(dataclasses.asdict(cfg))),  # as the file will have it
        "data": {
            name: {
                "manifest_hash": manifest.manifest_hash,
                f"{manifest.modality}s": len(part.labels_N),
            }
            for name, manifest, part in zip(SETS, manifests, sets, strict=False)
        },
        "classes": classes,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": round(time.time() - start, 1),
    }
    if still := rows.get("single_frame"):
        read = [
            still["knn"],
            *(still[k]["accuracy"] for k in ("linear", "attentive") if k in still),
        ]
        results["task"] = task_of(max(read), test.labels_N)
    all_rows = cfg.limit is None and cfg.state is None and cfg.only is None
    facts = facts_of(manifests, sets, all_rows=all_rows)
    results["warnings"] = validity_warnings(facts, classes)
    console.print(results_table(results))
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", markup=False, highlight=False, style="yellow")
    if compared:
        console.print(comparison_table(results, compared))
    _write(cfg.out, "results.json", json.dumps(results, indent=2).encode())
    html = write_report(results, subject, train, test, baseline, compared)
    console.print(f"report: {_write(cfg.out, 'report.html', html.encode())}")
    return results


def probe(
    train: ProbeSet,
    test: ProbeSet,
    row: str,
    cfg: EvaluateConfig,
    shifted: ProbeSet | None = None,
) -> dict[str, Any]:
    """All numbers of one row of the table, as results.json holds them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bank_ND = torch.from_numpy(train.features[row]).to(device)
    sets = (bank_ND, train.labels_N, torch.from_numpy(test.features[row]), test.labels_N)
    other = None if shifted is None else (torch.from_numpy(shifted.features[row]), shifted.labels_N)
    linear = linear_probe(*sets, shifted=other, epochs=cfg.probe_epochs, seed=cfg.seed)
    votes = (cfg.knn_k, cfg.knn_temperature)
    return {
        "knn": knn_accuracy(*sets, *votes),
        "knn_shift": None if other is None else knn_accuracy(*sets[:2], *other, *votes),
        "linear": dataclasses.asdict(linear),
        "few_shot_1pct": dataclasses.asdict(few_shot(*sets, share=0.01, seed=cfg.seed)),
        "few_shot_10": dataclasses.asdict(few_shot(*sets, per_class=10, seed=cfg.seed)),
        "width": bank_ND.shape[1],
    } | (_ranks(bank_ND[:RANKME_ROWS]) if row != "raw_pixels" else {})


def _attentive(sets: list[ProbeSet], row: str, heads: int, cfg: EvaluateConfig) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test, *shifted = [(part.tokens[row], part.labels_N) for part in sets]
    width = train[0].shape[-1]
    probe = attentive_probe(
        *train,
        *test,
        shifted=shifted[0] if shifted else None,
        heads=heads if width % heads == 0 else 1,
        epochs=cfg.attentive_epochs,
        lrs=cfg.attentive_lrs,
        weight_decays=cfg.attentive_decays,
        standardise=cfg.attentive_standardise,
        seed=cfg.seed,
        device=device,
    )
    return dataclasses.asdict(probe)


def _supervised(
    subject: Subject, sets: list[ProbeSet], cfg: EvaluateConfig
) -> dict[str, Any] | None:
    parts = [(part.pixels, part.labels_N) for part in sets if part.pixels is not None]
    if not parts:
        return None
    fresh = random_init(subject.encoder, cfg.seed).to(next(subject.encoder.parameters()).device)
    found = supervised_baseline(
        fresh, subject.preprocessing, *parts, epochs=cfg.supervised_epochs, seed=cfg.seed
    )
    return dataclasses.asdict(found)


def _ranks(features_ND: torch.Tensor) -> dict[str, float]:
    # Not of raw pixels: it would say nothing of the encoder, and thousands of dimensions take long.
    return {"rankme": rankme(features_ND), "rankme_centred": rankme(features_ND, centred=True)}


def _manifests(cfg: EvaluateConfig) -> list[Manifest]:
    """Of --data, --test and, where there is one, --shift-test."""
    uris = {"--data": cfg.data, "--test": cfg.test, "--shift-test": cfg.shift_test}
    sets = {flag: read_manifest(uri) for flag, uri in uris.items() if uri is not None}
    data = sets["--data"]
    for flag, manifest in sets.items():
        if manifest.modality != data.modality:
            raise ValueError(f"--data holds {data.modality}s, {flag} {manifest.modality}s")
        if flag != "--data" and (cfg.state is None or cfg.only is not None):
            check_classes({"--data": data, flag: manifest})
    if cfg.state is not None and data.modality != "video":
        raise ValueError("--state: images have no states; it goes with video")
    if cfg.only is not None and cfg.only not in data.classes:
        raise ValueError(f"--only: no class {cfg.only!r}; there are {', '.join(data.classes)}")
    return list(sets.values())


def _labels(cfg: EvaluateConfig, subject: Subject, classes: tuple[str, ...]) -> Labels:
    only = None if cfg.only is None else classes.index(cfg.only)
    if cfg.state is None:
        return Labels(Wanted(only=only))
    assert subject.sampler is not None
    return Labels(
        Wanted(column="states", only=only), state_reader(find_column(cfg), subject.sampler)
    )


def _probe_sets(
    cfg: EvaluateConfig,
    subject: Subject,
    baseline: VisionTransformer,
    manifests: list[Manifest],
    console: Console,
) -> tuple[list[ProbeSet], list[str]]:
    """The sets with their features, and the names of their classes."""
    clips = subject.sampler is not None
    attentive = clips and cfg.attentive_epochs > 0
    featurizers = probe_featurizers(
        *(subject.encoder, baseline, subject.preprocessing),
        clips=clips,
        attentive=attentive,
        pixels=cfg.supervised_epochs > 0,
    )
    totals = [min(manifest.num_samples, cfg.limit or sys.maxsize) for manifest in manifests]
    if attentive:
        check_token_bytes(subject.encoder, sum(totals))
    labels = _labels(cfg, subject, manifests[0].classes)
    with Progress(console=console, transient=True) as progress:

        def read(uri: str, total: int) -> ProbeSet:
            task = progress.add_task(f"features of {uri}", total=total)
            return probe_set(
                uri,
                featurizers,
                subject.preprocessing,
                batch_size=cfg.batch_size,
                sampler=subject.sampler,
                limit=cfg.limit,
                labels=labels,
                advance=lambda rows: progress.advance(task, rows),
            )

        uris = [uri for uri in (cfg.data, cfg.test, cfg.shift_test) if uri is not None]
        sets = [read(uri, total) for uri, total in zip(uris, totals, strict=True)]
    if cfg.state is None:
        return sets, list(manifests[0].classes)
    bins = Bins.of(sets[0].labels_N, cfg.bins)
    binned = [dataclasses.replace(p, labels_N=bins.classes(p.labels_N)) for p in sets]
    return binned, bins.names


def results_table(results: dict[str, Any]) -> Table:
    """The results as a table for a terminal."""
    title = " ".join(str(results["provenance"].get(k, "")) for k in ("run", "checkpoint")).strip()
    table = Table(title=title or "evaluation", title_justify="left")
    attentive = "attentive" in results["rows"]["encoder"]
    probes = ("attentive", "kNN", "linear") if attentive else ("kNN", "linear")
    shift = ("shifted",) if results["rows"]["encoder"]["knn_shift"] is not None else ()
    for name in ("", *probes, *shift, "1% labels", "10 per class", "RankMe"):
        table.add_column(name, justify="left" if not name else "right")
    for row, r in results["rows"].items():
        score, shifted = main_score(r)
        table.add_row(
            NAMES[row],
            *((f"{100 * score:.1f}",) if attentive else ()),
            f"{100 * r['knn']:.1f}",
            f"{100 * r['linear']['accuracy']:.1f}",
            *((f"{100 * shifted:.1f} ({100 * (shifted - score):+.1f})",) if shift else ()),
            *(
                f"{100 * r[k]['mean']:.1f} +- {100 * r[k]['std']:.1f}"
                for k in ("few_shot_1pct", "few_shot_10")
            ),
            f"{r['rankme']:.1f} of {r['width']}" if "rankme" in r else "-",
        )
    if found := results.get("supervised"):
        score, shifted = found["accuracy"], found["shift_accuracy"]
        cells = [f"{100 * score:.1f}", *("-" for _ in probes[1:])]
        cells += [f"{100 * shifted:.1f} ({100 * (shifted - score):+.1f})"] if shift else []
        table.add_row("supervised", *cells, "-", "-", "-")
    ours, random = results["rows"]["encoder"], results["rows"]["random_init"]
    gain = main_score(ours)[0] - main_score(random)[0]
    table.caption = f"accuracy in %; {probes[0]} is {100 * gain:+.1f} points over random init"
    if task := results.get("task"):
        shares = f"{100 * task['single_frame']:.1f}, guessing {100 * task['chance']:.1f}"
        table.caption += f"; a task of {task['kind']} (best of one frame {shares})"
    return table


def _write(out: str, name: str, data: bytes) -> str:
    fs, path = open_uri(out)
    write_atomic(fs, f"{path}/{name}", data)
    return f"{out.rstrip('/')}/{name}"


def main() -> None:
    """Entry point of `python -m pipelines.evaluate`."""
    run_command(lambda: tyro.cli(EvaluateConfig, description=__doc__), evaluate)


if __name__ == "__main__":
    main()
