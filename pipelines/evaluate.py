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
from collections.abc import Callable, Iterator
from typing import Any

# Lets `python pipelines/evaluate.py` work from an uninstalled checkout, as `ray job submit` runs it.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from models.preprocessing import Preprocessing
from models.vit import VisionTransformer
from models.weights import load_artifact
from pipelines.attentive_probe import attentive_probe
from pipelines.checkpoints import CheckpointError, load_encoder
from pipelines.clip_sampling import ClipSampler, training_sampler
from pipelines.comparison import comparison_table, read_compared
from pipelines.config import ClipConfig, EvaluateConfig
from pipelines.features import (
    PLACE,
    Featurizer,
    Pooling,
    check_classes,
    compute_features,
    decode_batches,
    encoder_features,
    iter_labelled,
    pixel_features,
    single_frame,
    table_labels,
    tubelet_features,
)
from pipelines.metrics import rankme
from pipelines.probes import few_shot, knn_accuracy, linear_probe, task_of
from pipelines.report import NAMES, ProbeSet, Subject, write_report
from pipelines.shards import Manifest, read_manifest
from pipelines.storage import open_uri

RANKME_ROWS = 10_000
TOKEN_BYTES = 8 * 2**30
"""Most memory for the frozen tokens that attentive probes read."""
TUBELETS = "raw_tubelets"  # raw pixels as tokens, by which an attentive probe reads them
PACKAGES = ("torch", "timm", "numpy", "pyarrow")


def load_subject(uri: str) -> Subject:
    """Loads a checkpoint, a run's best checkpoint, an artifact, or a foreign model.

    Raises:
        ValueError: none of these, saying what it was tried as.
    """
    fs, path = open_uri(uri)
    if fs.isfile(path) or _is_artifact(fs, path):
        artifact = load_artifact(uri)
        provenance = {"artifact": uri, **artifact.provenance}
        return Subject(artifact.encoder, artifact.preprocessing, provenance)
    try:
        encoder, config, info = load_encoder(uri)
    except CheckpointError as error:
        raise ValueError(f"--checkpoint: no artifact, and {error}") from error
    encoder.eval().requires_grad_(False)
    model = config.model
    prep = Preprocessing(image_size=model.image_size, mean=model.mean, std=model.std)
    checkpoint = str(info["uri"]).rstrip("/")
    provenance = {
        "run": config.run.name,
        "step": info["step"],
        "epoch": info["epoch"],
        "manifest_hash": info["manifest_hash"],
        "checkpoint": checkpoint.rpartition("/")[2],
    }
    run_uri, sampler = checkpoint.rpartition("/")[0], training_sampler(config)
    return Subject(encoder, prep, provenance, run_uri=run_uri, config=config, sampler=sampler)


def _is_artifact(fs: Any, path: str) -> bool:
    if not fs.isfile(f"{path}/config.json"):
        return False
    keys = json.loads(fs.cat_file(f"{path}/config.json")).keys()
    return bool(keys & {"rayjepa", "architecture", "model_type"})


def random_init(encoder: VisionTransformer, seed: int) -> VisionTransformer:
    """Builds an untrained encoder of the same shape; the global RNG stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            width=encoder.width,
            depth=encoder.depth,
            heads=encoder.heads,
            mlp_ratio=encoder.mlp_ratio,
            patch_std=encoder.patch_std,
            frames=encoder.frames,
            tubelet=encoder.tubelet,
            positions=encoder.positions,
        ).eval()


def with_sampler(cfg: EvaluateConfig, subject: Subject, modality: str) -> Subject:
    """Decides which frames clips are made of: the flags', else those of training; none of images.

    Raises:
        ValueError: both flags, or images for an encoder that learned from clips.
    """
    if cfg.fps is not None and cfg.stride is not None:
        raise ValueError("--stride: goes without --fps")
    if modality == "image":
        return dataclasses.replace(subject, sampler=None)
    settings = subject.sampler.settings if subject.sampler else ClipConfig()
    if cfg.fps is not None or cfg.stride is not None:
        settings = ClipConfig(fps=cfg.fps, stride=cfg.stride or 1)
    sampler = ClipSampler(frames=subject.encoder.frames, settings=settings)
    return dataclasses.replace(subject, sampler=sampler)


def evaluate(cfg: EvaluateConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Evaluates an encoder; writes results.json and report.html under `cfg.out`.

    Args:
        cfg: the job.
        console: where progress and the table go; None for stdout.

    Returns:
        What results.json holds: `rows` (per row of the table: knn, linear, few_shot_1pct,
        few_shot_10, rankme, of clips attentive), of clips `task` (`probes.task_of`), provenance,
        settings, data, versions.

    Raises:
        ValueError: sets without labels or with other classes than each other, or no such encoder.
    """
    console, start = console or Console(), time.time()
    manifests = _manifests(cfg)
    compared = read_compared(cfg, manifests)
    subject = with_sampler(cfg, load_subject(cfg.checkpoint), manifests[0].modality)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject.encoder.to(device)
    baseline = random_init(subject.encoder, cfg.seed).to(device)
    train, test = _probe_sets(cfg, subject, baseline, console)
    rows = {}
    with console.status("probing") as status:
        for row in train.features:
            status.update(f"probing {NAMES[row]}")
            rows[row] = probe(train, test, row, cfg)
            if row in train.tokens:
                heads = subject.encoder.heads
                rows[row]["attentive"] = _attentive(train, test, row, heads, cfg)
    results = {
        "rows": rows,
        "provenance": subject.provenance,
        "settings": {**dataclasses.asdict(cfg), "compare": list(cfg.compare)},
        "data": {
            name: {
                "manifest_hash": manifest.manifest_hash,
                f"{manifest.modality}s": len(part.labels_N),
            }
            for name, manifest, part in zip(("data", "test"), manifests, (train, test), strict=True)
        },
        "classes": list(manifests[0].classes),
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
    console.print(results_table(results))
    if compared:
        console.print(comparison_table(results, compared))
    _write(cfg.out, "results.json", json.dumps(results, indent=2).encode())
    html = write_report(results, subject, train, test, baseline, compared)
    console.print(f"report: {_write(cfg.out, 'report.html', html.encode())}")
    return results


def probe(train: ProbeSet, test: ProbeSet, row: str, cfg: EvaluateConfig) -> dict[str, Any]:
    """All numbers of one row of the table, as results.json holds them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bank_ND = torch.from_numpy(train.features[row]).to(device)
    sets = (bank_ND, train.labels_N, torch.from_numpy(test.features[row]), test.labels_N)
    linear = linear_probe(*sets, epochs=cfg.probe_epochs, seed=cfg.seed)
    return {
        "knn": knn_accuracy(*sets, k=cfg.knn_k, temperature=cfg.knn_temperature),
        "linear": dataclasses.asdict(linear),
        "few_shot_1pct": dataclasses.asdict(few_shot(*sets, share=0.01, seed=cfg.seed)),
        "few_shot_10": dataclasses.asdict(few_shot(*sets, per_class=10, seed=cfg.seed)),
        "width": bank_ND.shape[1],
    } | (_ranks(bank_ND[:RANKME_ROWS]) if row != "raw_pixels" else {})


def _attentive(
    train: ProbeSet, test: ProbeSet, row: str, heads: int, cfg: EvaluateConfig
) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = train.tokens[row].shape[-1]
    probe = attentive_probe(
        *(train.tokens[row], train.labels_N, test.tokens[row], test.labels_N),
        heads=heads if width % heads == 0 else 1,
        epochs=cfg.attentive_epochs,
        seed=cfg.seed,
        device=device,
    )
    return dataclasses.asdict(probe)


def _ranks(features_ND: torch.Tensor) -> dict[str, float]:
    # Not of raw pixels: it would say nothing of the encoder, and thousands of dimensions take long.
    return {"rankme": rankme(features_ND), "rankme_centred": rankme(features_ND, centred=True)}


def _manifests(cfg: EvaluateConfig) -> tuple[Manifest, Manifest]:
    data, test = read_manifest(cfg.data), read_manifest(cfg.test)
    if data.modality != test.modality:
        raise ValueError(f"--data holds {data.modality}s, --test {test.modality}s")
    check_classes({"--data": data, "--test": test})
    return data, test


def _probe_sets(
    cfg: EvaluateConfig, subject: Subject, baseline: VisionTransformer, console: Console
) -> tuple[ProbeSet, ProbeSet]:
    attentive = subject.sampler is not None and cfg.attentive_epochs > 0
    featurizers = _featurizers(subject, baseline, attentive)
    if attentive:
        _check_token_bytes(cfg, subject.encoder)
    with Progress(console=console, transient=True) as progress:

        def read(uri: str) -> ProbeSet:
            total = min(read_manifest(uri).num_samples, cfg.limit or sys.maxsize)
            task = progress.add_task(f"features of {uri}", total=total)
            return probe_set(
                uri,
                featurizers,
                subject.preprocessing,
                batch_size=cfg.batch_size,
                sampler=subject.sampler,
                limit=cfg.limit,
                advance=lambda rows: progress.advance(task, rows),
            )

        return read(cfg.data), read(cfg.test)


def _featurizers(
    subject: Subject, baseline: VisionTransformer, attentive: bool
) -> dict[str, Featurizer]:
    """By row of the table; for attentive probes of all tokens, which are averaged later."""
    prep = subject.preprocessing
    pooling: Pooling = "patches" if attentive else "mean"
    encoder = encoder_features(subject.encoder, prep, pooling=pooling)
    featurizers = {
        "encoder": encoder,
        "random_init": encoder_features(baseline, prep, pooling=pooling),
    }
    if subject.sampler is not None:
        featurizers["single_frame"] = single_frame(encoder)
    featurizers["raw_pixels"] = pixel_features(prep)
    if attentive:
        featurizers[TUBELETS] = tubelet_features(subject.encoder, prep)
    return featurizers


def _check_token_bytes(cfg: EvaluateConfig, encoder: VisionTransformer) -> None:
    clips = sum(
        min(read_manifest(uri).num_samples, cfg.limit or sys.maxsize)
        for uri in (cfg.data, cfg.test)
    )
    pixels = 3 * encoder.tubelet * encoder.patch_size**2
    need = 2 * clips * encoder.num_patches * (3 * encoder.width + pixels)
    if need > TOKEN_BYTES:
        raise ValueError(
            f"--limit: the attentive probes of {clips:,} clips would keep {need / 2**30:.0f} GiB of "
            "tokens in memory; take fewer clips, or leave them out with --attentive-epochs 0"
        )


def probe_set(
    uri: str,
    featurizers: dict[str, Featurizer],
    prep: Preprocessing,
    *,
    batch_size: int,
    sampler: ClipSampler | None = None,
    limit: int | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> ProbeSet:
    """Computes every featurizer's features of a labelled set in one pass over its samples.

    Raises:
        ValueError: no row has a label.
    """
    seen: list[pa.Table] = []

    def watched() -> Iterator[pa.Table]:
        for table in iter_labelled(uri, limit):
            seen.append(table.select(["label", *PLACE]))
            advance(table.num_rows)
            yield table

    batches = decode_batches(watched(), prep, batch_size, sampler)
    halved = {name: _halve_tokens(featurize) for name, featurize in featurizers.items()}
    found = compute_features(halved, batches)
    rows = pa.concat_tables(seen)
    places_N3 = np.stack([rows[name].to_numpy() for name in PLACE], axis=1)
    tokens = {name: values for name, values in found.items() if values.ndim == 3}
    features = {
        name: values if values.ndim == 2 else values.mean(axis=1, dtype=np.float32)
        for name, values in found.items()
        if name != TUBELETS
    }
    if TUBELETS in tokens:
        tokens["raw_pixels"] = tokens.pop(TUBELETS)
    return ProbeSet(uri, features, table_labels(rows), places_N3, tokens)


def _halve_tokens(featurize: Featurizer) -> Featurizer:
    """Tokens in float16, which is plenty for what a LayerNorm gives; pooled features as they are."""

    def halved(pixels: torch.Tensor) -> torch.Tensor:
        values = featurize(pixels)
        return values.half() if values.ndim == 3 else values

    return halved


def results_table(results: dict[str, Any]) -> Table:
    """The results as a table for a terminal."""
    title = " ".join(str(results["provenance"].get(k, "")) for k in ("run", "checkpoint")).strip()
    table = Table(title=title or "evaluation", title_justify="left")
    attentive = "attentive" in results["rows"]["encoder"]
    probes = ("attentive", "kNN", "linear") if attentive else ("kNN", "linear")
    for name in ("", *probes, "1% labels", "10 per class", "RankMe"):
        table.add_column(name, justify="left" if not name else "right")
    for row, r in results["rows"].items():
        table.add_row(
            NAMES[row],
            *((f"{100 * r['attentive']['accuracy']:.1f}",) if attentive else ()),
            f"{100 * r['knn']:.1f}",
            f"{100 * r['linear']['accuracy']:.1f}",
            *(
                f"{100 * r[k]['mean']:.1f} +- {100 * r[k]['std']:.1f}"
                for k in ("few_shot_1pct", "few_shot_10")
            ),
            f"{r['rankme']:.1f} of {r['width']}" if "rankme" in r else "-",
        )
    ours, random = results["rows"]["encoder"], results["rows"]["random_init"]
    gain = ours["knn"] - random["knn"]
    if attentive:
        gain = ours["attentive"]["accuracy"] - random["attentive"]["accuracy"]
    table.caption = f"accuracy in %; {probes[0]} is {100 * gain:+.1f} points over random init"
    if task := results.get("task"):
        shares = f"{100 * task['single_frame']:.1f}, guessing {100 * task['chance']:.1f}"
        table.caption += f"; a task of {task['kind']} (best of one frame {shares})"
    return table


def _write(out: str, name: str, data: bytes) -> str:
    fs, path = open_uri(out)
    fs.makedirs(path, exist_ok=True)
    fs.pipe_file(f"{path}/{name}", data)
    return f"{out.rstrip('/')}/{name}"


def main() -> None:
    """Entry point of `python -m pipelines.evaluate`."""
    evaluate(tyro.cli(EvaluateConfig, description=__doc__))


if __name__ == "__main__":
    main()
