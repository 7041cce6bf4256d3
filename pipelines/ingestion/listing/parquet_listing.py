"""Lists Parquet files: the row groups that one task reads, and the classes that files declare."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config.ingest import LABEL_COLUMN, IngestConfig
from pipelines.ingestion.entries.failures import DAMAGE, raise_if_unreachable
from pipelines.runtime.uris import open_exact

_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class RowGroups:
    """A run of row groups of one file.

    Attributes:
        file: place of the file among those listed.
        row_groups: [start, stop); empty when the file could not be opened.
        rows: [first, last + 1) in the file; a file that could not be opened counts as one row.
        label_map: place in the list of all classes by the file's own index; None where it is the
            same.
    """

    file: int
    row_groups: tuple[int, int] = (0, 0)
    rows: tuple[int, int] = (0, 1)
    label_map: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ParquetListing:
    """What the footers of a source's Parquet files say.

    Attributes:
        runs: in the order of files and rows.
        num_items: images; None where a row may hold several.
        classes: names of all classes that files declare.
        notes: lines for the user.
    """

    runs: tuple[RowGroups, ...]
    num_items: int | None
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def list_parquet(
    fs: Any, paths: Sequence[str], cfg: IngestConfig, chunk_bytes: int
) -> ParquetListing:
    """Opens every file's footer.

    Args:
        fs: file system of the files.
        paths: the files in it.
        cfg: which columns to read.
        chunk_bytes: aim for runs of this many bytes.

    Raises:
        ValueError: a file lacks the image column, or the label column that was asked for.
    """
    with ThreadPoolExecutor(16) as pool:
        footers, schemas = zip(*pool.map(lambda path: _footer(fs, path), paths), strict=True)
    opened = [(path, s) for path, s in zip(paths, schemas, strict=True) if s is not None]
    several = False
    column = cfg.label_column or LABEL_COLUMN
    for path, schema in opened:
        _refuse_twins(path, schema, (("image", cfg.image_column), ("label", column)))
        images = column_type(schema, cfg.image_column)
        if images is None:
            raise ValueError(f"--image-column: {path} has only the columns {schema.names}")
        several = several or _is_list(images)
    notes = _unlabelled(opened, cfg)
    declared = [() if s is None else declared_classes(s, column) for s in schemas]
    classes, maps = merge_classes(declared)
    runs = [
        run
        for file, footer in enumerate(footers)
        for run in _cut(file, footer, maps[file], chunk_bytes)
    ]
    rows = sum(run.rows[1] - run.rows[0] for run in runs)
    return ParquetListing(tuple(runs), None if several else rows, classes, notes)


def _footer(fs: Any, path: str) -> tuple[Any, pa.Schema | None]:
    """Returns a file's footer and schema; None for a damaged file, which is reported when read."""
    try:
        with open_exact(fs, path) as file:
            parquet = pq.ParquetFile(file)
            return parquet.metadata, parquet.schema_arrow
    except DAMAGE as error:
        raise_if_unreachable(error)
        return None, None


def _refuse_twins(path: str, schema: pa.Schema, columns: Iterable[tuple[str, str]]) -> None:
    for flag, column in columns:
        found = column_path(schema, column)
        if found and schema.names.count(found[0]) > 1:
            raise ValueError(f"--{flag}-column: {path} has several columns named {found[0]!r}")


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    is_list = any(test(kind) for test in (*lists, *views))
    return is_list and not pa.types.is_primitive(kind.value_type)  # numbers are bytes of one image


def column_path(schema: pa.Schema, column: str) -> list[str] | None:
    """Returns the path to a column, also inside a struct (`image.bytes`); None if absent."""
    if column in schema.names:
        return [column]
    top, *inner = column.split(".")
    if not inner or top not in schema.names:
        return None
    kind = schema.field(top).type
    for name in inner:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return [top, *inner]


def column_type(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Returns the type of `column`, as `column_path` finds it."""
    path = column_path(schema, column)
    if path is None:
        return None
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    return kind


def partition_label(path: str, column: str) -> str | None:
    """Returns the value of `column` in a path of Hive partitions: `.../label=cat/0.parquet`."""
    found = re.findall(rf"(?:^|/){re.escape(column)}=([^/]*)(?=/)", path)
    value = unquote(found[-1]) if found else _HIVE_NULL
    return None if value == _HIVE_NULL else value


def _unlabelled(files: Sequence[tuple[str, pa.Schema]], cfg: IngestConfig) -> tuple[str, ...]:
    """Returns a line on files without the label column, or raises when it was asked for by name."""
    column = cfg.label_column or LABEL_COLUMN
    without = [
        (path, schema.names)
        for path, schema in files
        if column_type(schema, column) is None and f"/{column}=" not in f"/{path}"
    ]
    if not without:
        return ()
    path, names = without[0]
    if cfg.label_column is not None:
        raise ValueError(f"--label-column: {path} has no column {column!r}, only {names}")
    if len(without) == len(files):
        return (f"no column {column!r}: unlabelled (columns: {', '.join(names)})",)
    some = f"{len(without)} of {len(files)} files"
    line = f"no column {column!r} in {some}: these are unlabelled ({path} has {', '.join(names)})"
    return (line,)


def _cut(
    file: int, footer: Any, label_map: tuple[int, ...] | None, chunk_bytes: int
) -> Iterator[RowGroups]:
    """Yields runs of row groups of about `chunk_bytes`."""
    if footer is None:
        yield RowGroups(file)
        return
    start, first, row, size = 0, 0, 0, 0
    for group in range(footer.num_row_groups):
        size += footer.row_group(group).total_byte_size
        row += footer.row_group(group).num_rows
        if size >= chunk_bytes or group == footer.num_row_groups - 1:
            yield RowGroups(file, (start, group + 1), (first, row), label_map)
            start, first, size = group + 1, row, 0


def declared_classes(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Returns the class names that Hugging Face `datasets` stores in the schema's metadata.

    Whatever stands there that is no list of names counts as none.
    """
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return ()
    for name in ("info", "features", *(column_path(schema, column) or [column]), "names"):
        if not isinstance(found, dict):
            return ()
        found = found.get(name)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return ()
    return tuple(found) if len(set(found)) == len(found) else ()


def merge_classes(
    declared: Sequence[tuple[str, ...]],
) -> tuple[tuple[str, ...], list[tuple[int, ...] | None]]:
    """Brings the classes that files declare into one list, by name.

    Args:
        declared: class names of each file; none where it declares nothing.

    Returns:
        All classes, those of the first file first, and for each file the new place of its own
        indices: None where they stay, empty where it is not known which classes they mean.
    """
    lists = Counter(names for names in declared if names)
    classes = tuple(dict.fromkeys(name for names in lists for name in names))
    if len(lists) <= 1:
        return classes, [None] * len(declared)
    place = {name: index for index, name in enumerate(classes)}
    return classes, [tuple(place[name] for name in names) for names in declared]
