"""Reads one chunk of a source, item by item; what is broken is an item too, with its reason."""

from __future__ import annotations

import contextlib
import json
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import IngestConfig
from pipelines.sources import (
    IMAGE_SUFFIXES,
    Chunk,
    Entry,
    raise_if_unreachable,
    sidecar_path,
    suffix_of,
)

READ_BYTES = 32 * 2**20
PARQUET_BATCH_ROWS = 64
LARGEST_LABEL = 2**20  # larger integers are names, not class indices
NO_FILE = ("unreadable", "no regular file, or a link to nothing")
LABEL_KEYS = ("label", "cls", "class")

Label = int | str | None


@dataclass(frozen=True, slots=True)
class Item:
    """One image or video of a source as it came, or why there is none.

    Attributes:
        uri: address of the file, or `file#member` of a tar, or `file#row=N` of a Parquet file.
        data: an image's encoded bytes.
        label: class index or class name.
        problem: (reason, detail) when the item could not be had.
        path: a video's file on this machine, there until the next item is asked for.
        sidecars: the files beside a video, by name ("actions", "states").
        size: bytes of that file.
    """

    uri: str
    data: bytes = b""
    label: Label = None
    problem: tuple[str, str] | None = None
    path: str = ""
    sidecars: tuple[tuple[str, bytes], ...] = ()
    size: int = 0

    @property
    def num_bytes(self) -> int:
        """Encoded bytes of the item."""
        return self.size or len(self.data)


def read_chunk(chunk: Chunk, cfg: IngestConfig) -> Iterator[Item]:
    """Yields every item of `chunk` in order; what cannot be read is an item with a problem.

    Raises:
        OSError: the storage as a whole fails (no connection, busy); ingest can be run again.
    """
    fs = fsspec.filesystem(chunk.protocol)
    if cfg.modality == "video":
        yield from _read_videos(fs, chunk, cfg)
    elif chunk.kind in ("folder", "list"):
        yield from _read_files(fs, chunk, cfg)
    elif chunk.kind == "webdataset":
        yield from _read_tar(fs, chunk, cfg)
    else:
        yield from _read_parquet(fs, chunk, cfg)


def _problem(error: BaseException, otherwise: str = "unreadable") -> tuple[str, str]:
    """Returns (reason, detail): `unreadable` for what the storage refused, else `otherwise`."""
    raise_if_unreachable(error)
    if isinstance(error, OSError) and error.strerror:
        return "unreadable", f"{type(error).__name__}: {error.strerror}"
    return otherwise, f"{type(error).__name__}: {error}"


def _too_many_bytes(size: int, limit: int) -> tuple[str, str]:
    return "too_many_bytes", f"{size} is over the limit of {limit} bytes"


def _label_of(entry: Entry, chunk: Chunk) -> Label:
    """A folder's name is a name even when it is a number; a list's "3" is a class index."""
    return as_label(entry.label) if chunk.kind == "list" else entry.label


def _read_files(fs: Any, chunk: Chunk, cfg: IngestConfig) -> Iterator[Item]:
    for group in _groups(chunk.entries, READ_BYTES):
        wanted = [entry for entry in group if 0 <= entry.size <= cfg.max_bytes]
        # cat_ranges, unlike cat, leaves "*" and "[" in names alone; S3 fetches concurrently.
        contents = fs.cat_ranges([e.path for e in wanted], None, None, on_error="return")
        by_path = {entry.path: data for entry, data in zip(wanted, contents, strict=True)}
        for entry in group:
            uri, data = chunk.uri(entry), by_path.get(entry.path)
            if entry.size < 0:
                yield Item(uri, problem=NO_FILE)
            elif data is None:
                yield Item(uri, problem=_too_many_bytes(entry.size, cfg.max_bytes))
            elif isinstance(data, BaseException):
                yield Item(uri, problem=_problem(data))
            else:
                yield Item(uri, data, _label_of(entry, chunk))


def _groups(entries: Iterable[Entry], limit: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + entry.size > limit:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.size
    if group:
        yield group


def _read_videos(fs: Any, chunk: Chunk, cfg: IngestConfig) -> Iterator[Item]:
    """Yields videos as files on this machine: they may be larger than its memory."""
    for entry in chunk.entries:
        uri = chunk.uri(entry)
        if entry.size < 0:
            yield Item(uri, problem=NO_FILE)
            continue
        if entry.size > cfg.video.max_bytes:
            yield Item(uri, problem=_too_many_bytes(entry.size, cfg.video.max_bytes))
            continue
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(_local_file(fs, entry.path))
                sidecars = tuple((name, _sidecar(fs, entry, name, cfg)) for name in entry.sidecars)
            except OSError as error:
                yield Item(uri, problem=_problem(error))
                continue
            label = _label_of(entry, chunk)
            yield Item(uri, path=path, label=label, sidecars=sidecars, size=entry.size)


@contextlib.contextmanager
def _local_file(fs: Any, path: str) -> Iterator[str]:
    """Yields the path of a file on this machine, a copy removed afterwards if it is remote."""
    if "file" in fs.protocol:
        with Path(path).open("rb"):
            pass  # raises where it cannot be read
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="rayjepa-") as folder:
        copy = f"{folder}/video"
        fs.get_file(path, copy)
        yield copy


def _sidecar(fs: Any, entry: Entry, name: str, cfg: IngestConfig) -> bytes:
    with fs.open(sidecar_path(entry.path, name), "rb") as file:
        data: bytes = file.read(cfg.max_bytes + 1)  # the preparer refuses what is over the limit
    return data


class _StrictTarInfo(tarfile.TarInfo):
    """A damaged header inside an archive is an error; tarfile takes it for the end of the file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):  # not the zero block at the end
                raise tarfile.ReadError(f"bad member header: {error}") from error
            raise


def _read_tar(fs: Any, chunk: Chunk, cfg: IngestConfig) -> Iterator[Item]:
    uri = chunk.uri(chunk.entries[0])
    done = 0
    try:
        with (
            fs.open(chunk.entries[0].path, "rb") as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as tar,
        ):
            for group in _tar_groups(tar, cfg):
                for item in _group_items(group, uri):
                    yield item
                    done += 1
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        reason, detail = _problem(error, "corrupt_archive")
        yield Item(uri, problem=(reason, f"{detail} (after {done} images)"))


Group = dict[str, bytes | tuple[str, str]]


def _tar_groups(tar: tarfile.TarFile, cfg: IngestConfig) -> Iterator[Group]:
    """Yields runs of members that share a key (the path up to the first dot of the name)."""
    key, group = "", Group()
    try:
        for member in tar:
            if member.isdir():
                continue
            folder, _, name = member.name.rpartition("/")
            member_key = f"{folder}/{name.partition('.')[0]}"
            if member_key != key and group:
                yield group
                group = Group()
            key = member_key
            group[member.name] = _member(tar, member, cfg)
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        if group:
            yield group  # its members were read whole
        raise
    if group:
        yield group


def _member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, cfg: IngestConfig
) -> bytes | tuple[str, str]:
    if member.size > cfg.max_bytes:
        return _too_many_bytes(member.size, cfg.max_bytes)
    file = tar.extractfile(member) if member.isfile() else None
    if file is None:
        return "unreadable", "no regular file"
    data = file.read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name}: unexpected end of data")
    return data


def _group_items(group: Group, uri: str) -> Iterator[Item]:
    try:
        label = _group_label(group)
        label_problem = None
    except ValueError as error:
        label, label_problem = None, ("bad_label", str(error))
    for name, data in group.items():
        if suffix_of(name) not in IMAGE_SUFFIXES:
            continue
        if isinstance(data, tuple):
            yield Item(f"{uri}#{name}", problem=data)
        else:
            yield Item(f"{uri}#{name}", data, label, label_problem)


def _group_label(group: Group) -> Label:
    """Returns the label in `.cls` or `.json`, else the folder inside the tar, else None."""
    for name, data in group.items():
        if isinstance(data, bytes) and name.endswith(".cls"):
            return as_label(data.decode().strip())
        if isinstance(data, bytes) and name.endswith(".json"):
            values = json.loads(data)
            if not isinstance(values, dict):
                raise ValueError(f"{name} holds no JSON object")
            found = [values[key] for key in LABEL_KEYS if key in values]
            if found:
                return as_label(found[0])
    folders = PurePosixPath(next(iter(group))).parts[:-1]
    return folders[-1] if folders and folders[-1] != "." else None


def as_label(value: Any) -> Label:
    """Returns a class index for small integers (or their text), None for negative ones, else text.

    Raises:
        ValueError: neither an integer nor text.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if not re.fullmatch("-?[0-9]+", value):
            return value
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"label {value!r} is neither an integer nor text")
    if value >= LARGEST_LABEL:
        return str(value)
    return value if value >= 0 else None


def _read_parquet(fs: Any, chunk: Chunk, cfg: IngestConfig) -> Iterator[Item]:
    entry, row = chunk.entries[0], chunk.rows[0]
    uri = chunk.uri(entry)
    try:
        with fs.open(entry.path, "rb") as file:
            parquet = pq.ParquetFile(file)
            for group in range(*chunk.row_groups):
                for item in _read_group(parquet, group, uri, row, cfg):
                    yield item
                    row += 1
        problem = ("unreadable", "could not be opened when it was listed")
    except (OSError, pa.ArrowException) as error:
        problem = _problem(error, "corrupt_archive")
    for lost in range(row, chunk.rows[1]):
        yield Item(f"{uri}#row={lost}", problem=problem)


def _read_group(parquet: Any, group: int, uri: str, row: int, cfg: IngestConfig) -> Iterator[Item]:
    """Yields the rows of one row group; the rows behind damage are items with that problem."""
    end = row + parquet.metadata.row_group(group).num_rows
    present = parquet.schema_arrow.names
    names = [name for name in (cfg.image_column, cfg.label_column) if name in present]
    try:
        for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, [group], names):
            for values in batch.to_pylist():
                yield _row_item(f"{uri}#row={row}", values, cfg)
                row += 1
    except (OSError, pa.ArrowException) as error:
        problem = _problem(error, "corrupt_archive")
        for lost in range(row, end):
            yield Item(f"{uri}#row={lost}", problem=problem)


def _row_item(uri: str, values: dict[str, Any], cfg: IngestConfig) -> Item:
    image = values[cfg.image_column]
    if isinstance(image, dict):  # Hugging Face's Image feature
        image = image.get("bytes")
    if image is None:
        return Item(uri, problem=("missing_image", "the row has no image bytes"))
    if not isinstance(image, bytes):
        return Item(uri, problem=("missing_image", f"{type(image).__name__} instead of bytes"))
    try:
        return Item(uri, image, as_label(values.get(cfg.label_column)))
    except ValueError as error:
        return Item(uri, problem=("bad_label", str(error)))
