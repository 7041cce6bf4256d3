"""Reads rows of Parquet files: images as bytes, as paths to files, or several in one row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config.ingest import LABEL_COLUMN, IngestConfig
from pipelines.ingestion.entries.chunks import Chunk
from pipelines.ingestion.entries.failures import DAMAGE, problem_of, too_many_bytes
from pipelines.ingestion.listing.parquet_listing import column_path
from pipelines.ingestion.reading.items import Item, Problem, Tally
from pipelines.ingestion.reading.labels import (
    NOT_UNDERSTOOD,
    UNDECLARED,
    Label,
    LabelError,
    as_label,
)
from pipelines.runtime.uris import open_exact, open_uri

BATCH_ROWS = 64
LONGEST_PATH = 4096


def read_parquet(fs: Any, chunk: Chunk, cfg: IngestConfig, _: Tally) -> Iterator[Item]:
    """Yields the images of the chunk's rows; a damaged row is an item with a problem."""
    entry, row = chunk.entries[0], chunk.rows[0]
    uri = chunk.uri(entry)
    try:
        with open_exact(fs, entry.path) as file:
            parquet = pq.ParquetFile(file)
            rows = _Rows(fs, chunk, parquet.schema_arrow, cfg)
            for group in range(*chunk.row_groups):
                yield from _read_group(parquet, group, row, rows)
                row += parquet.metadata.row_group(group).num_rows
        problem = ("unreadable", "could not be opened when it was listed")
    except DAMAGE as error:
        problem = problem_of(error, "corrupt_archive")
    for lost in range(row, chunk.rows[1]):
        yield Item(f"{uri}#row={lost}", problem=problem)


def _read_group(parquet: Any, group: int, row: int, rows: _Rows) -> Iterator[Item]:
    """Yields the rows of one row group; the rows behind damage are items with that problem."""
    end = row + parquet.metadata.row_group(group).num_rows
    try:
        for batch in parquet.iter_batches(BATCH_ROWS, [group], rows.columns):
            for number in range(batch.num_rows):
                yield from rows.items(batch, number, row)
                row += 1
    except DAMAGE as error:
        problem = problem_of(error, "corrupt_archive")
        for lost in range(row, end):
            yield Item(f"{rows.uri}#row={lost}", problem=problem)


def _is_numbers(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], int | float)


def _bytes_in(values: list[Any]) -> bytes:
    """Returns an encoded image that is stored as a list of its bytes, as Spark and numpy have it.

    Raises:
        _Missing: these are no bytes.
    """
    try:
        return bytes(value & 255 if -128 <= value < 0 else value for value in values)
    except (TypeError, ValueError) as error:
        raise _Missing("a list of numbers that are no bytes of an encoded image") from error


class _Missing(Exception):
    """A row has no image that can be read.

    Attributes:
        problem: reason and detail.
    """

    def __init__(self, detail: str, reason: str = "missing_image") -> None:
        super().__init__(detail)
        self.problem: Problem = (reason, detail)


class _Rows:
    """Turns the rows of one file into items."""

    def __init__(self, fs: Any, chunk: Chunk, schema: pa.Schema, cfg: IngestConfig) -> None:
        entry = chunk.entries[0]
        self._fs, self._protocol, self._max_bytes = fs, chunk.protocol, cfg.max_bytes
        self._folder = entry.path.rpartition("/")[0]
        self._partition, self._label_map = entry.label, chunk.label_map
        self.uri = chunk.uri(entry)
        self._image = column_path(schema, cfg.image_column)
        self._label = column_path(schema, cfg.label_column or LABEL_COLUMN)
        self.columns = [".".join(path) for path in (self._image, self._label) if path]

    def items(self, batch: pa.RecordBatch, number: int, row: int) -> Iterator[Item]:
        """Yields the images of one row: row `number` of `batch`, row `row` of the file."""
        label, label_problem = self._read_label(batch, number)
        uri = f"{self.uri}#row={row}"
        try:
            image = self._value(batch, self._image, number)
            images = image if isinstance(image, list) and not _is_numbers(image) else [image]
            if not images:
                raise _Missing("the row has an empty list of images")
        except _Missing as error:
            yield Item(uri, problem=error.problem)
            return
        for place, one in enumerate(images):
            of_several = f"{uri}&image={place}" if len(images) > 1 else uri
            try:
                yield Item(of_several, self._encoded(one), label, None, label_problem)
            except _Missing as error:
                yield Item(of_several, problem=error.problem)

    def _value(self, batch: pa.RecordBatch, path: list[str] | None, number: int) -> Any:
        assert path is not None, "the listing has seen this column"
        column = batch.column(path[0]).slice(number, 1)
        for name in path[1:]:
            column = pc.struct_field(column, name)
        try:
            return column[0].as_py()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, or nanoseconds
            raise _Missing(f"{column.type}: {error}") from error

    def _read_label(self, batch: pa.RecordBatch, number: int) -> tuple[Label, Problem | None]:
        try:
            if self._label is None:
                return as_label(self._partition), None
            label = as_label(self._value(batch, self._label, number))
        except LabelError as error:
            return None, (error.reason, error.detail)
        except _Missing as error:
            return None, (NOT_UNDERSTOOD, error.problem[1])
        if self._label_map is None or not isinstance(label, int):
            return label, None
        if label >= len(self._label_map):
            count = len(self._label_map)
            return None, (UNDECLARED, f"{label}, and this file declares {count} classes")
        return self._label_map[label], None

    def _encoded(self, image: Any) -> bytes:
        """Returns the bytes of one image.

        Raises:
            _Missing: there are none.
        """
        if isinstance(image, dict):  # Hugging Face's Image feature
            fields = sorted(image)
            path, image = image.get("path"), image.get("bytes")
            if image is None and isinstance(path, str):
                image = path
            elif image is None and not {"bytes", "path"} & set(fields):
                raise _Missing(f"a struct of {fields}, neither bytes nor path among them")
        if image is None:
            raise _Missing("the row has no image bytes")
        if isinstance(image, str):
            return self._read_file(image)
        if isinstance(image, list) and _is_numbers(image):
            return _bytes_in(image)
        if not isinstance(image, bytes):
            raise _Missing(f"{type(image).__name__} instead of bytes")
        return image

    def _read_file(self, name: str) -> bytes:
        """Reads a file that a row names by an address or a path from the Parquet file's folder."""
        shown = repr(name if len(name) <= 80 else f"{name[:77]}...")
        if not name.strip() or len(name) > LONGEST_PATH or not name.isprintable():
            raise _Missing(f"text that is no path: {shown}")
        if "://" in name and name.partition("://")[0] not in ("file", "s3", self._protocol):
            raise _Missing(f"{shown}: of addresses only s3:// and file:// are read")
        fs, path = self._fs, f"{self._folder}/{name}" if not name.startswith("/") else name
        if "://" in name:
            fs, path = open_uri(name)
        try:
            info = fs.info(path)
            if info["type"] == "directory":
                raise _Missing(f"{shown} is a folder")
            if (info["size"] or 0) > self._max_bytes:
                raise _Missing(*reversed(too_many_bytes(info["size"], self._max_bytes)))
            data: bytes = fs.cat_file(path)
        except FileNotFoundError as error:
            raise _Missing(f"nothing at {shown}") from error
        except OSError as error:
            reason, detail = problem_of(error)
            raise _Missing(detail, reason) from error
        return data
