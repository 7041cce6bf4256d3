"""Frozen features of stored images: decode in threads, encode in batches, memory bounded.

Every probe, report and training run gets its features here, through the one evaluation transform of
`models.preprocessing`, so their numbers compare.

Shape suffixes: B images of one forward pass, N all images, H and W pixels, C channels, T tokens
(patches), D feature width.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.images import decode_image
from models.preprocessing import Preprocessing, eval_transform, normalize
from pipelines.shards import Manifest, open_shards, read_manifest, read_row_group

Pooling: TypeAlias = Literal["mean", "patches"]
Featurizer: TypeAlias = Callable[[Tensor], Tensor]
"""uint8 images [B, C, H, W] to features with B rows."""

In = TypeVar("In")
Out = TypeVar("Out")

COLUMNS = ("sample_id", "image", "label", "source_uri")
PLACE = ("shard", "row_group", "row")
READ_AHEAD = 4
"""Row groups read ahead of the decoder (S3 answers slowly, but many at a time)."""
PIXEL_SIDE = 32
"""Raw pixels are compared at no more than this many pixels a side (3,072 numbers an image)."""


Place: TypeAlias = tuple[int, int, np.ndarray | None]
"""Shard, row group, and rows of it; None for all that have a label."""


def check_classes(sets: Mapping[str, Manifest]) -> None:
    """Refuses labelled sets that a probe cannot compare: label indices must mean the same.

    Args:
        sets: manifests by the flag that names them.

    Raises:
        ValueError: one has no labels, or their classes differ.
    """
    for flag, manifest in sets.items():
        if not manifest.classes:
            raise ValueError(f"{flag}: these shards have no labels, which every probe needs")
    first, second = (manifest.classes for manifest in sets.values())
    if first != second:
        differing = ", ".join(sorted(set(first) ^ set(second))[:6]) or "their order"
        raise ValueError(f"{' and '.join(sets)} have different classes: {differing}")


def load_labelled(uri: str, limit: int | None = None, *, seed: int = 0) -> pa.Table:
    """Reads labelled rows of ingested shards into memory: all, or `limit` of them (all if fewer).

    Those of random row groups, because files are often in class order and a row group is the least
    that can be read; the same ones every time, in file order. Ingest mixes the classes of a folder's
    row groups, not those of tars and Parquet files.

    Returns:
        Table with columns sample_id, image, label and source_uri, and `PLACE`: where in the shards
        each row stands.

    Raises:
        ValueError: no row has a label.
    """
    tables = list(iter_labelled(uri, limit, seed=seed))
    if not sum(table.num_rows for table in tables):
        raise ValueError(f"{uri}: no labelled images; probes need shards with labels")
    return pa.concat_tables(tables)


def iter_labelled(uri: str, limit: int | None = None, *, seed: int = 0) -> Iterator[pa.Table]:
    """Yields what `load_labelled` returns one row group at a time, for sets larger than memory."""
    manifest = read_manifest(uri)
    fs, root = open_shards(uri)

    def find(group: tuple[int, int, int]) -> Place:
        file = manifest.shards[group[0]].file
        labels = read_row_group(fs, root, file, group[1], ["label"])["label"]
        return group[0], group[1], np.flatnonzero(labels.is_valid().to_numpy())

    def read(place: Place) -> pa.Table:
        shard, group, rows = place
        table = read_row_group(fs, root, manifest.shards[shard].file, group, COLUMNS)
        if rows is None:
            rows = np.flatnonzero(table["label"].is_valid().to_numpy())
        columns = (np.full_like(rows, shard), np.full_like(rows, group), rows)
        table = table.take(rows)
        for name, column in zip(PLACE, columns, strict=True):
            table = table.append_column(name, pa.array(column))
        return table

    groups = manifest.row_groups()
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read") as pool:
        places: list[Place] = [(shard, group, None) for shard, group, _ in groups]
        if limit is not None and limit < manifest.num_samples:
            order = np.random.default_rng(seed).permutation(len(groups))
            drawn = _in_order(pool, find, (groups[i] for i in order), READ_AHEAD)
            with contextlib.closing(drawn):
                places = _first_rows(drawn, limit)
        yield from _in_order(pool, read, places, READ_AHEAD)


def _first_rows(drawn: Iterable[Place], limit: int) -> list[Place]:
    """Of the rows drawn the first `limit`, in file order."""
    places: list[Place] = []
    for shard, group, rows in drawn:
        assert rows is not None
        places += [(shard, group, rows[:limit])] if len(rows) else []
        limit -= len(rows)
        if limit <= 0:
            break
    return sorted(places, key=lambda place: place[:2])


def read_places(uri: str, places_N3: np.ndarray) -> pa.Table:
    """Reads single rows again by their `PLACE` columns, in the order given."""
    manifest, (fs, root) = read_manifest(uri), open_shards(uri)
    rows = []
    for shard, group, row in places_N3.tolist():
        table = read_row_group(fs, root, manifest.shards[shard].file, group, COLUMNS)
        rows.append(table.slice(row, 1))
    return pa.concat_tables(rows)


def table_labels(rows: pa.Table) -> np.ndarray:
    """Returns the class index of every row as int64 [N], -1 where there is none."""
    labels: np.ndarray = rows["label"].fill_null(-1).to_numpy().astype(np.int64)
    return labels


def load_image(data: bytes, prep: Preprocessing) -> np.ndarray:
    """Decodes one encoded image and applies the evaluation transform: uint8 [H, W, C]."""
    return eval_transform(decode_image(data), prep)


def decode_batches(
    tables: pa.Table | Iterable[pa.Table], prep: Preprocessing, batch_size: int
) -> Iterator[Tensor]:
    """Decodes the `image` column in threads, at most two batches ahead of the consumer.

    Yields:
        uint8 images [B, C, H, W] in row order, B = `batch_size` except in the last one.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode") as pool:
        decode = functools.partial(load_image, prep=prep)
        images = _in_order(pool, decode, _image_column(tables), 2 * batch_size)
        while batch := list(itertools.islice(images, batch_size)):
            yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


def decode_all(rows: pa.Table, prep: Preprocessing) -> Tensor:
    """Decodes every row into memory: uint8 [N, C, H, W], for features extracted repeatedly."""
    return torch.cat(list(decode_batches(rows, prep, 256)))


def encoder_features(
    encoder: nn.Module,
    prep: Preprocessing,
    *,
    pooling: Pooling = "mean",
    autocast: bool = False,
) -> Featurizer:
    """Wraps an encoder as a function of uint8 images.

    Args:
        encoder: maps normalised float images [B, C, H, W] to tokens [B, T, D]; runs where its
            weights are.
        pooling: "mean" of the tokens, fp32 [B, D]; or "patches", all of them, fp32 [B, T, D].
        autocast: run the forward in bfloat16.
    """
    device = next(encoder.parameters()).device

    def featurize(images_BCHW: Tensor) -> Tensor:
        x_BCHW = normalize(images_BCHW.to(device, non_blocking=True), prep.mean, prep.std)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            tokens_BTD = encoder(x_BCHW)
        tokens_BTD = tokens_BTD.float()
        features: Tensor = tokens_BTD.mean(dim=1) if pooling == "mean" else tokens_BTD
        return features

    return featurize


def pixel_features(prep: Preprocessing) -> Featurizer:
    """Raw normalised pixels as features, [B, 3 * side * side] with side at most `PIXEL_SIDE`."""

    def featurize(images_BCHW: Tensor) -> Tensor:
        x_BCHW = normalize(images_BCHW, prep.mean, prep.std)
        if x_BCHW.shape[-1] > PIXEL_SIDE:
            x_BCHW = F.interpolate(
                x_BCHW, (PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True
            )
        return x_BCHW.flatten(1)

    return featurize


def compute_features(
    featurizers: Mapping[str, Featurizer], batches: Iterable[Tensor]
) -> dict[str, np.ndarray]:
    """Runs every featurizer over the same decoded batches, each image decoded once.

    Returns:
        One fp32 array [N, ...] per featurizer, rows in order.

    Raises:
        ValueError: there is no image.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in featurizers}
    with torch.inference_mode():
        for images_BCHW in batches:
            for name, featurize in featurizers.items():
                parts[name].append(featurize(images_BCHW).cpu().numpy())
    if not all(parts.values()):
        raise ValueError("no images to compute features of (are these rows labelled?)")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def extract_features(
    encoder: nn.Module,
    prep: Preprocessing,
    rows: pa.Table | Iterable[pa.Table] | Tensor,
    *,
    batch_size: int = 256,
    pooling: Pooling = "mean",
    autocast: bool = False,
) -> np.ndarray:
    """Computes frozen features; the encoder is put into eval mode and back.

    Args:
        encoder: as for `encoder_features`.
        prep: evaluation transform; its size must be the encoder's.
        rows: shard rows (encoded images), or `decode_all`'s uint8 [N, C, H, W].

    Returns:
        fp32 [N, D], or [N, T, D] for pooling "patches".
    """
    batches: Iterable[Tensor]
    if isinstance(rows, Tensor):
        batches = torch.split(rows, batch_size)
    else:
        batches = decode_batches(rows, prep, batch_size)
    training = encoder.training
    encoder.eval()
    try:
        featurize = encoder_features(encoder, prep, pooling=pooling, autocast=autocast)
        return compute_features({"encoder": featurize}, batches)["encoder"]
    finally:
        encoder.train(training)


def _image_column(tables: pa.Table | Iterable[pa.Table]) -> Iterator[bytes]:
    for table in [tables] if isinstance(tables, pa.Table) else tables:
        for value in table["image"]:
            yield value.as_py()


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Generator[Out]:
    """Maps in the pool, in order, never more than `ahead` items before the consumer."""
    pending: deque[Future[Out]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # a consumer that stops early does not wait for what it will not read
        for future in pending:
            future.cancel()
