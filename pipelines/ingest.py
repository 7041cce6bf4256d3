"""Turns raw images or videos into validated, deduplicated Parquet shards, on Ray Data.

    python -m pipelines.ingest --source data/cifar10/train --out shards/train
    python -m pipelines.ingest --source s3://bucket/raw --out s3://bucket/shards --short-side 256
    python -m pipelines.ingest --source footage --out shards/video --short-side 128 --video.fps 10
    python -m pipelines.ingest --source rtsp://camera/1 --out shards/live --follow

Ingest has two stages. First, tasks turn chunks of the source into staging parts
(ingestion/staging.py). Then the driver finds duplicates among all sample ids, which takes about 100
bytes of memory a row and no image, and a second set of tasks copies the remaining rows, in order,
into shards. The manifest is written last. If ingest is killed at any point and run again, it does
only what is missing and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Lets `python pipelines/ingest.py` work from an uninstalled checkout, as `ray job submit` runs it.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext
from rich.console import Console
from rich.table import Table

from pipelines.config.ingest import IngestConfig
from pipelines.dataset.aspects import Aspects, ingest_note, read_aspects
from pipelines.dataset.shards import (
    LOSSES,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    Manifest,
    encode_table,
    hash_bytes,
    list_names,
    read_manifest,
    remove_unnamed,
    write_manifest,
)
from pipelines.ingestion.entries.addresses import check_address
from pipelines.ingestion.entries.chunks import chunk_to_json
from pipelines.ingestion.listing.choosing import shortened
from pipelines.ingestion.listing.class_list import read_classes
from pipelines.ingestion.live import follow
from pipelines.ingestion.merging import (
    build_index,
    choose_classes,
    first_occurrences,
    labels_left_out,
    marker_path,
    merge_shard,
    plan_shards,
    read_shard_note,
)
from pipelines.ingestion.preparing.images import DIM
from pipelines.ingestion.reading.items import Tally
from pipelines.ingestion.sources.registry import list_source
from pipelines.ingestion.sources.source_type import Listing
from pipelines.ingestion.staging import (
    NO_ROW,
    STAGING,
    chunk_key,
    items_path,
    read_items,
    read_tally,
    stage_chunk,
)
from pipelines.runtime.cluster import configure_data, start_ray
from pipelines.runtime.errors import run_command
from pipelines.runtime.lines.watch import cluster_lines, plainly
from pipelines.runtime.places import prepare
from pipelines.runtime.progress import Meter, counting
from pipelines.runtime.signals import stop_on_signals
from pipelines.runtime.uris import abort_uploads, open_uri, write_atomic

IO_THREADS = 16
NOT_IN_CLASSES = "label_not_in_classes"


def ingest(cfg: IngestConfig) -> Manifest:
    """Turns `cfg.source` into shards at `cfg.out`, or finds that this is already done.

    Every source item ends in exactly one of these: the shards, the number of duplicates, or the
    quarantine.

    Raises:
        ValueError: The source has nothing to read or no valid item, or `cfg.out` holds anything but
            a data set of this program.
        ray.exceptions.RayTaskError: The storage failed; run again to continue.
    """
    started = time.monotonic()
    console = Console()
    check_address(cfg.source)
    cfg = prepare(cfg)
    _check_out(cfg.out)
    fixed = read_classes(cfg.classes) if cfg.classes else ()
    with counting(console, "listing", "files") as progress:
        listing = list_source(cfg, progress)
    for note in listing.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    cfg = dataclasses.replace(cfg, modality=listing.modality)
    chunks = [chunk_to_json(chunk) for chunk in listing.chunks]
    keys = [chunk_key(chunk, cfg) for chunk in chunks]
    fingerprint = _fingerprint(keys, listing, fixed, cfg)
    finished = _finished(cfg, fingerprint)
    if finished is not None:
        _clean_up(cfg, finished)
        console.print(f"{cfg.out}: {finished.num_samples:,} samples, up to date")
        return finished
    start_ray()
    with cluster_lines(plainly(console)):
        items = _stage(chunks, keys, listing, cfg, console)
        manifest = _merge(keys, items, listing, fixed, fingerprint, cfg, console)
    write_manifest(cfg.out, manifest)
    _clean_up(cfg, manifest)
    aspects = read_aspects(cfg.out, manifest)
    _summary(manifest, listing, aspects, time.monotonic() - started, console)
    if aspects and (line := ingest_note(aspects)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return manifest


def _fingerprint(
    keys: Sequence[str], listing: Listing, fixed: tuple[str, ...], cfg: IngestConfig
) -> str:
    packing = [cfg.shard_bytes, cfg.row_group_rows, listing.classes, *([fixed] if fixed else [])]
    return hash_bytes(json.dumps([keys, packing]).encode()).hex()


def _finished(cfg: IngestConfig, fingerprint: str) -> Manifest | None:
    """Returns the manifest at `cfg.out` if it was made from this source and configuration."""
    try:
        manifest = read_manifest(cfg.out)
    except ValueError:
        return None
    there = list_names(cfg.out)
    complete = all(shard.file in there for shard in manifest.shards)
    return manifest if complete and manifest.fingerprint == fingerprint else None


def _check_out(out: str) -> None:
    """Refuses a folder with files of other programs, as ours could not be told apart from them."""
    # Consoles make an object named "" to show an empty folder on S3.
    visible = sorted(name for name in list_names(out) if name and not name.startswith("."))
    if not visible or STAGING in visible:
        return
    try:
        manifest = read_manifest(out)
    except ValueError as error:
        shown = ", ".join(visible[:3])
        message = f"--out: {out} holds something else ({shown}); give an empty folder ({error})"
        raise ValueError(message) from error
    if manifest.live is not None:  # a stream cannot be recorded again
        raise ValueError(f"--out: {out} holds a recorded live stream; give an empty folder")


def _run(
    function: Callable[..., dict[str, Any]],
    rows: list[dict[str, Any]],
    cfg: IngestConfig,
    meter: Meter,
) -> None:
    """Maps `function` over `rows` with Ray Data, one task a row, and shows the progress."""
    if not rows:
        return
    context = DataContext.get_current().copy()
    configure_data(context)
    with DataContext.current(context):
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        results = dataset.map(function, fn_kwargs={"cfg": cfg}, num_cpus=1)
    for result in results.iter_rows():
        meter.advance(result["items"], result["bytes"])


def _stage(
    chunks: list[str], keys: list[str], listing: Listing, cfg: IngestConfig, console: Console
) -> list[pa.Table]:
    """Stages the chunks that are not done, and returns the items of all chunks in source order."""
    fs, root = open_uri(cfg.out)
    there = list_names(cfg.out, STAGING)
    missing = [
        {"chunk": chunk, "key": key}
        for chunk, key in zip(chunks, keys, strict=True)
        if items_path(key) not in there
    ]
    if len(missing) < len(chunks):
        console.print(f"continuing: {len(chunks) - len(missing)} of {len(chunks)} chunks are done")
    share = len(missing) / len(chunks)
    with Meter(console, "reading", int(listing.num_bytes * share), f"{cfg.modality}s") as meter:
        _run(stage_chunk, missing, cfg, meter)
    with ThreadPoolExecutor(IO_THREADS) as pool:
        return list(pool.map(lambda key: read_items(fs, f"{root}/{STAGING}/{key}"), keys))


def _merge(
    keys: list[str],
    tables: list[pa.Table],
    listing: Listing,
    fixed: tuple[str, ...],
    fingerprint: str,
    cfg: IngestConfig,
    console: Console,
) -> Manifest:
    """Writes quarantine and shards, and returns the manifest that describes them."""
    refused = pa.concat_tables([table.filter(table["reason"].is_valid()) for table in tables])
    missing = pc.equal(refused["segment"], NO_ROW)
    losses = _write_quarantine(refused.filter(missing), LOSSES, cfg)
    tally = _total(tables)
    quarantined = _write_quarantine(refused.filter(pc.invert(missing)), QUARANTINE, cfg)
    items = sum(pc.sum(pc.equal(table["segment"], 0)).as_py() or 0 for table in tables)
    if listing.num_items not in (None, items):
        raise ValueError(
            f"--source: {cfg.source}: {items} items, {listing.num_items} when it was listed"
        )
    if items == 0:
        besides = f", but {dict(tally.ignored)}" if tally.ignored else ""
        raise ValueError(f"--source: no {cfg.modality} in {cfg.source}{besides}")
    if sum(quarantined.values()) == items:
        one = f"not one good {cfg.modality} among {items}: {quarantined}"
        raise ValueError(
            f"--source: {cfg.source}: {one}; {cfg.out}/{QUARANTINE} has each with its reason"
        )
    index = build_index(keys, tables)
    keep_N = first_occurrences(index.ids_N16)
    classes = choose_classes(tables, listing.classes, fixed)
    if fixed and (left_out := labels_left_out(index, keep_N, classes)):
        losses |= {NOT_IN_CLASSES: left_out.total()}
        shown = ", ".join(f"{name} ({count})" for name, count in left_out.most_common(6))
        note = f"note: {left_out.total()} labels are not in --classes and left out: {shown}"
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    plans = plan_shards(index, keep_N, classes, cfg)
    num_bytes = int(index.sizes_N[keep_N].sum())
    with Meter(console, "writing", num_bytes, "samples") as meter:
        _write_shards(plans, cfg, meter)
    fs, root = open_uri(cfg.out)
    with ThreadPoolExecutor(IO_THREADS) as pool:
        notes = list(pool.map(lambda plan: read_shard_note(fs, root, plan), plans))
    num_samples = sum(shard.rows for shard, _ in notes)
    kept, duplicates = (int((index.firsts_N & keep).sum()) for keep in (keep_N, ~keep_N))
    assert num_samples == keep_N.sum(), "a row was lost"
    assert kept + duplicates + sum(quarantined.values()) == items, "an item was lost"
    mean, std = _mean_std([moments for _, moments in notes], num_samples)
    live = ("follow", "live")
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", *live)}
    return Manifest(
        modality=cfg.modality,
        classes=classes.names,
        num_samples=num_samples,
        num_bytes=num_bytes,
        num_frames=int(index.frames_N[keep_N].sum()) if cfg.modality == "video" else None,
        shards=tuple(shard for shard, _ in notes),
        mean=mean,
        std=std,
        quarantined=quarantined,
        duplicates=duplicates,
        losses=losses,
        ignored=dict(sorted(tally.ignored.items())),
        notes=dict(sorted(tally.notes.items())),
        ingest=settings,
        fingerprint=fingerprint,
    )


def _total(tables: Sequence[pa.Table]) -> Tally:
    """Adds up what was found besides the items in all chunks."""
    tallies = [read_tally(table) for table in tables]
    ignored = sum((tally.ignored for tally in tallies), Counter[str]())
    return Tally({}, ignored, sum((tally.notes for tally in tallies), Counter[str]()))


def _write_quarantine(refused: pa.Table, file: str, cfg: IngestConfig) -> dict[str, int]:
    """Writes the items that are not in the shards, and returns their number by reason."""
    table = refused.select(QUARANTINE_SCHEMA.names).cast(QUARANTINE_SCHEMA)
    fs, root = open_uri(cfg.out)
    if file == QUARANTINE or table.num_rows:
        write_atomic(fs, f"{root}/{file}", encode_table(table, 2**16))
    return dict(sorted(Counter(table["reason"].to_pylist()).items()))


def _write_shards(plans: list[str], cfg: IngestConfig, meter: Meter) -> None:
    _, root = open_uri(cfg.out)
    notes, there = list_names(cfg.out, STAGING), list_names(cfg.out)
    missing = []
    for plan in plans:
        done = marker_path(root, plan).rpartition("/")[2] in notes
        if not done or _shard_file(plan, cfg) not in there:
            missing.append({"plan": plan})
    _run(merge_shard, missing, cfg, meter)


def _shard_file(plan: str, cfg: IngestConfig) -> str:
    fs, root = open_uri(cfg.out)
    return read_shard_note(fs, root, plan)[0].file


Rgb = tuple[float, float, float]


def _mean_std(moments: list[list[float]], count: int) -> tuple[Rgb, Rgb]:
    """Returns channel means and standard deviations to 6 decimals; all samples weigh the same."""
    sums = [math.fsum(column) / count for column in zip(*moments, strict=True)]
    stds = [math.sqrt(max(sums[c + 3] - sums[c] ** 2, 0.0)) for c in range(3)]
    mean = (round(sums[0], 6), round(sums[1], 6), round(sums[2], 6))
    return mean, (round(stds[0], 6), round(stds[1], 6), round(stds[2], 6))


def _clean_up(cfg: IngestConfig, manifest: Manifest) -> None:
    """Removes staging, partly written files, and shards that the manifest does not name."""
    fs, root = open_uri(cfg.out)
    if fs.exists(f"{root}/{STAGING}"):
        fs.rm(f"{root}/{STAGING}", recursive=True)
    if not manifest.losses and LOSSES in list_names(cfg.out):
        fs.rm(f"{root}/{LOSSES}")
    remove_unnamed(cfg.out, manifest.shards)
    abort_uploads(cfg.out)  # of tasks that were killed


def _summary(
    manifest: Manifest,
    listing: Listing,
    aspects: Aspects | None,
    seconds: float,
    console: Console,
) -> None:
    video = manifest.modality == "video"
    items = manifest.num_samples + manifest.duplicates + sum(manifest.quarantined.values())
    table = Table("ingested", "", title=None)
    table.columns[1].justify = "right"
    for name, count in (
        ("videos", listing.num_items if video else None),
        ("segments" if video else "images", manifest.num_samples),
        ("frames", manifest.num_frames),
        ("classes", len(manifest.classes)),
        ("duplicates dropped", manifest.duplicates),
        ("quarantined", sum(manifest.quarantined.values())),
        *((f"  {reason}", count) for reason, count in manifest.quarantined.items()),
        (
            "losses in kept ones",
            sum(manifest.losses.values()) if video or manifest.losses else None,
        ),
        *((f"  {reason}", count) for reason, count in manifest.losses.items()),
        ("files ignored", listing.ignored),
        *((f"  {suffix}", count) for suffix, count in shortened(listing.passed_over)),
        (
            "members that are no images",
            sum(manifest.ignored.values()) if manifest.ignored else None,
        ),
        *((f"  {kind}", count) for kind, count in manifest.ignored.items()),
        ("shards", len(manifest.shards)),
    ):
        if count is not None:
            table.add_row(name, f"{count:,}")
    if aspects:
        table.add_row("width x height", str(aspects))
    table.add_row("MB", f"{manifest.num_bytes / 1e6:,.1f}")
    table.add_row("seconds", f"{seconds:.1f}")
    rate = (manifest.num_frames if video else items) or 0
    table.add_row("frames/s" if video else "images/s", f"{rate / seconds:,.0f}")
    console.print(table)
    if sharing := manifest.notes.get("images that share a sample"):
        console.print(f"{sharing:,} images share a sample with others: --image-member chooses")
    if dim := manifest.notes.get(DIM):
        console.print(
            f"warning: {dim:,} 16-bit images use less than an eighth of their range and are nearly "
            "black; if they hold fewer bits, say so with --deep-range (4095 for 12, or auto)"
        )


def main() -> None:
    """Command line."""
    import tyro

    run_command(lambda: tyro.cli(IngestConfig), _ingest_or_follow)


def _ingest_or_follow(cfg: IngestConfig) -> None:
    if not cfg.follow:
        ingest(cfg)
        return
    with stop_on_signals() as stop:
        follow(cfg, stop)


if __name__ == "__main__":
    main()
