"""Embeds a whole data set with an exported encoder into Parquet, by a Ray Data actor pool.

    python -m pipelines.embed --artifact artifact --data shards/train --out embeddings

    python -m pipelines.embed --artifact artifact --data shards/live --out embeddings --follow

    OUT/part-<key>-00000.parquet ...   rows in the order of the data set
    OUT/embed.json                     written last: a folder without it is not finished

Columns: sample_id, embedding (fixed-size list of float32), label and source_uri. Video, whose rows
are segments, also has start_s, and live streams have recorded_at. With --pooling patches, where
pictures may have fewer tokens than the encoder's grid (fit whole, regions left out), embedding is a
list of the picture's own tokens; tokens has their numbers (time step times the patches of the
encoder's grid, plus the place in the picture's grid) and grid its rows and columns. Run again, the
job does only what is missing. If it is killed, no file is left half-written. The files do not
depend on the number of workers.

Each file of a growing set belongs to one shard (`part-<key>-<shard>-<row group>.parquet`); a later
run adds the files of the new shards.

Shape suffixes: N rows, T patches, D feature width.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Lets `python pipelines/embed.py` work from an uninstalled checkout, as `ray job submit` runs it.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import pyarrow as pa
import ray
import torch
import tyro
from ray.data import ActorPoolStrategy, DataContext
from rich.console import Console

from models.artifacts.alignment import load_alignment
from models.artifacts.artifact import Artifact, load_artifact, weights_hash
from models.artifacts.formats.rayjepa import stored_preprocessing
from models.encoders.input_batch import InputBatch
from models.media.preprocessing import Preprocessing
from pipelines.config.data import ClipConfig
from pipelines.config.jobs import EmbedConfig
from pipelines.dataset.aspects import fit_notes
from pipelines.dataset.embeddings import Part, plan_parts, to_parquet
from pipelines.dataset.row_groups import read_footer, read_row_group
from pipelines.dataset.rows import COLUMNS
from pipelines.dataset.shards import (
    MANIFEST,
    Manifest,
    hash_bytes,
    list_names,
    read_manifest,
)
from pipelines.evaluation.features import (
    compute_features,
    decode_batches,
    encoder_features,
    with_regions,
)
from pipelines.loading.clips import ClipSampler
from pipelines.runtime.cluster import configure_data, start_ray
from pipelines.runtime.errors import run_command
from pipelines.runtime.lines.quiet import RESTARTS, stderr_without
from pipelines.runtime.lines.watch import cluster_lines, plainly
from pipelines.runtime.places import prepare
from pipelines.runtime.progress import Meter
from pipelines.runtime.signals import stop_on_signals
from pipelines.runtime.uris import open_uri, write_atomic

RECORD = "embed.json"
SCHEMA_VERSION = 1
LATER_FIELDS = (("fit", "exclude"), ("background", "deep_range"))
"""Fields that each version of the artifact's preprocessing added; without them, defaults held."""


def embed(cfg: EmbedConfig) -> dict[str, Any]:
    """Embeds every image or segment of `cfg.data`, or finds that this is already done.

    Returns:
        The content of embed.json: counts, shape, files, and the origin of encoder and data.

    Raises:
        ValueError: There is no artifact or there are no shards, or `cfg.out` holds anything but a
            finished or unfinished run of the same job.
    """
    cfg = prepare(cfg)
    console = Console()
    _refuse_a_run(cfg.artifact)
    artifact, manifest = load_artifact(cfg.artifact), read_manifest(cfg.data)
    record = _describe(cfg, artifact, manifest)
    parts = plan_parts(manifest, record)
    missing = _missing(cfg.out, record, parts)
    if missing:
        _say_fit(cfg, artifact, manifest, console)
        if len(missing) < len(parts):
            console.print(f"continuing: {len(parts) - len(missing)} of {len(parts)} files are done")
        _run(missing, cfg, manifest, console)
    return _finish(cfg, record, parts, manifest, console)


def follow(cfg: EmbedConfig, stop: threading.Event) -> dict[str, Any] | None:
    """Embeds the shards of a live stream as they are published.

    Ends when the ingest of the stream ends or `stop` is set.

    Returns:
        The content of the last embed.json; None if there was nothing to embed.

    Raises:
        ValueError: As for `embed`, or `cfg.data` is not a recorded live stream.
    """
    cfg = prepare(cfg)
    console, embedder, record = Console(), Embedder(cfg), None
    _refuse_a_run(cfg.artifact)
    artifact, told = load_artifact(cfg.artifact), False
    while True:
        manifest = read_manifest(cfg.data) if MANIFEST in list_names(cfg.data) else None
        if manifest is not None:
            if manifest.live is None:
                raise ValueError(f"--follow: {cfg.data} is not a recorded live stream")
            if not told:
                _say_fit(cfg, artifact, manifest, console)
                told = True
            now = _describe(cfg, artifact, manifest)
            parts = plan_parts(manifest, now)
            missing = _missing(cfg.out, now, parts)
            for part in missing:
                if not stop.is_set():
                    embedder({"part": json.dumps(dataclasses.asdict(part))})
            if stop.is_set():
                return record
            if missing or record is None:
                record = _finish(cfg, now, parts, manifest, console)
            if not manifest.live["open"]:
                return record
        if stop.wait(cfg.poll_seconds):
            return record


def _say_fit(cfg: EmbedConfig, artifact: Artifact, manifest: Manifest, console: Console) -> None:
    """Prints what the encoder's fit does to pictures of another aspect."""
    prep = artifact.preprocessing
    for note in fit_notes([("--data", cfg.data, manifest)], prep.fit, prep.image_size):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _refuse_a_run(uri: str) -> None:
    """Refuses the folder of a training run, which has a config.json as an artifact has."""
    fs, path = open_uri(uri)
    if not fs.isfile(f"{path}/config.json"):
        return
    config = json.loads(fs.cat_file(f"{path}/config.json"))
    if {"run", "model", "optim"} <= config.keys():
        command = f"python -m pipelines.export --checkpoint {uri} --out artifact"
        raise ValueError(
            f"--artifact: {uri} is a run or a checkpoint, no artifact; export it first:\n{command}"
        )


def _finish(
    cfg: EmbedConfig,
    record: dict[str, Any],
    parts: list[Part],
    manifest: Manifest,
    console: Console,
) -> dict[str, Any]:
    """Writes embed.json."""
    record |= {"files": _files(cfg.out, parts)}
    record |= {"rows": sum(file["rows"] for file in record["files"])}
    if record["rows"] != manifest.num_samples:
        raise RuntimeError(f"{record['rows']} embeddings of {manifest.num_samples} samples")
    fs, root = open_uri(cfg.out)
    write_atomic(fs, f"{root}/{RECORD}", (json.dumps(record, indent=1) + "\n").encode())
    console.print(f"{cfg.out}: {record['rows']:,} embeddings of shape {record['shape']}")
    return record


def _describe(cfg: EmbedConfig, artifact: Artifact, manifest: Manifest) -> dict[str, Any]:
    """Describes the embeddings; `key` is a hash of everything that determines their values."""
    encoder, prep = artifact.encoder, with_regions(artifact.preprocessing, cfg.exclude)
    patches = cfg.pooling == "patches"
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "pooling": cfg.pooling,
        "shape": [encoder.num_patches, encoder.width] if patches else [encoder.width],
        "preprocessing": stored_preprocessing(prep),
        "weights_hash": weights_hash(encoder),
        "manifest_hash": manifest.manifest_hash,
        "classes": list(manifest.classes),
    }
    if manifest.modality == "video":
        content["clip"] = {"frames": encoder.frames, "fps": cfg.fps, "stride": cfg.stride}
    if cfg.align is not None:
        content["align"] = _checked_alignment(cfg, cfg.align, artifact, manifest)
    decisive = dict(content)
    if manifest.live is not None:  # embeddings stay valid when shards are added
        del decisive["manifest_hash"]
    names = list_names(cfg.out)
    keys = [_key(decisive), *_former_keys(decisive, prep)]
    begun = [k for k in keys if any(name.startswith(f"part-{k}-") for name in names)]
    key = begun[0] if begun else keys[0]
    return {"key": key, **content, "provenance": artifact.provenance}


def _checked_alignment(
    cfg: EmbedConfig, uri: str, artifact: Artifact, manifest: Manifest
) -> dict[str, Any]:
    """Describes --align; raises a ValueError if it is not for these embeddings."""
    stored = load_alignment(uri)
    stored.check(artifact.encoder, with_regions(artifact.preprocessing, cfg.exclude))
    video = manifest.modality == "video"
    stored.check_clips({"fps": cfg.fps, "stride": cfg.stride} if video else None)
    return {"how": stored.origin.how, "hash": stored.alignment.hash}


def _key(decisive: dict[str, Any]) -> str:
    return hash_bytes(json.dumps(decisive, sort_keys=True).encode()).hex()[:12]


def _former_keys(decisive: dict[str, Any], prep: Preprocessing) -> Iterator[str]:
    """Yields the keys that folders begun before the preprocessing had `LATER_FIELDS` have."""
    values = decisive["preprocessing"]
    defaults = {field.name: field.default for field in dataclasses.fields(prep)}
    for names in LATER_FIELDS:
        if all(getattr(prep, name) == defaults[name] for name in names):
            values = {k: v for k, v in values.items() if k not in names}
        yield _key({**decisive, "preprocessing": values})


def _missing(out: str, record: dict[str, Any], parts: list[Part]) -> list[Part]:
    """Returns the files that are missing; refuses a folder that holds anything else."""
    fs, root = open_uri(out)
    there = {n.rpartition("/")[2] for n in fs.ls(root, detail=False)} if fs.exists(root) else set()
    there = {name for name in there if not name.startswith(".")}
    foreign = sorted(there - {part.file for part in parts} - {RECORD})
    if RECORD in there and json.loads(fs.cat_file(f"{root}/{RECORD}"))["key"] != record["key"]:
        foreign.append(f"{RECORD} of another encoder, data set or pooling")
    if foreign:
        shown = ", ".join(foreign[:3])
        raise ValueError(f"--out: {out} holds something else ({shown}); give an empty folder")
    return [part for part in parts if part.file not in there]


def _run(parts: list[Part], cfg: EmbedConfig, manifest: Manifest, console: Console) -> None:
    start_ray()
    context = DataContext.get_current().copy()
    configure_data(context)
    items = [{"part": json.dumps(dataclasses.asdict(part))} for part in parts]
    with DataContext.current(context):
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        results = dataset.map(
            Embedder,  # type: ignore[arg-type]  # a class, as its documentation asks for
            fn_constructor_kwargs={"cfg": cfg},
            compute=ActorPoolStrategy(size=min(cfg.workers, len(items))),
            num_gpus=1 if cfg.gpu else 0,
        )
    share = sum(part.rows for part in parts) / max(manifest.num_samples, 1)
    noun = "images" if manifest.modality == "image" else "segments"
    with (
        stderr_without(RESTARTS),
        cluster_lines(plainly(console)),
        Meter(console, "embedding", int(manifest.num_bytes * share), noun) as meter,
    ):
        for result in results.iter_rows():
            meter.advance(result["rows"], result["bytes"])


class Embedder:
    """An actor of the pool, which has the encoder and writes one file at a time."""

    def __init__(self, cfg: EmbedConfig) -> None:
        if not cfg.gpu:  # Ray gives an actor one thread; the machine's cores are for the pool
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // cfg.workers))
        artifact = load_artifact(cfg.artifact)
        self._cfg, self._prep = cfg, with_regions(artifact.preprocessing, cfg.exclude)
        encoder = artifact.encoder.to("cuda" if cfg.gpu else "cpu").eval()
        settings = ClipConfig(fps=cfg.fps, stride=cfg.stride)
        self._clips = ClipSampler(frames=encoder.frames, settings=settings)
        self._featurizers = {
            "embedding": encoder_features(encoder, self._prep, pooling=cfg.pooling)
        }
        if cfg.pooling == "patches" and self._prep.partial:
            self._featurizers["grid"] = _grids
        self._alignment = None if cfg.align is None else load_alignment(cfg.align).alignment

    def __call__(self, item: dict[str, str]) -> dict[str, int]:
        """Writes one output file; returns its rows and the bytes of its images or segments."""
        part = json.loads(item["part"])
        fs, root = open_uri(self._cfg.data)
        manifest = read_manifest(self._cfg.data)
        modality, columns, times = manifest.modality, COLUMNS[manifest.modality], list[str]()
        if modality == "video":
            times = ["start_s", *(["recorded_at"] if manifest.live is not None else [])]
        kept: list[pa.Table] = []
        num_bytes = 0

        def tables() -> Iterator[pa.Table]:
            nonlocal num_bytes
            for file, group in part["groups"]:
                table = read_row_group(fs, root, file, group, [*columns, *times])
                num_bytes += table[modality].nbytes
                kept.append(table.select(["sample_id", "label", "source_uri", *times]))
                yield table

        sampler = self._clips if modality == "video" else None
        batches = decode_batches(tables(), self._prep, self._cfg.batch_size, sampler)
        found = compute_features(self._featurizers, batches)
        if self._alignment is not None:
            found["embedding"] = self._alignment(found["embedding"])
        fs, root = open_uri(self._cfg.out)
        content = to_parquet(pa.concat_tables(kept), found["embedding"], found.get("grid"))
        write_atomic(fs, f"{root}/{part['file']}", content)
        return {"rows": len(found["embedding"]), "bytes": num_bytes}


def _grids(batch: InputBatch) -> torch.Tensor:
    assert batch.grids_B2 is not None
    return batch.grids_B2


def _files(out: str, parts: list[Part]) -> list[dict[str, Any]]:
    fs, root = open_uri(out)
    files = []
    for part in parts:
        rows = read_footer(fs, f"{root}/{part.file}").num_rows
        files.append({"file": part.file, "rows": rows})
    return files


def main() -> None:
    """Entry point of `python -m pipelines.embed`."""
    run_command(lambda: tyro.cli(EmbedConfig, description=__doc__), _embed_or_follow)


def _embed_or_follow(cfg: EmbedConfig) -> None:
    if not cfg.follow:
        embed(cfg)
        return
    with stop_on_signals() as stop:
        follow(cfg, stop)


if __name__ == "__main__":
    main()
