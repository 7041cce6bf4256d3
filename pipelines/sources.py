"""Where raw images come from: folders, WebDataset tars and Parquet files, local or on S3.

`list_source` cuts a source into chunks, always the same ones for the same listing; a chunk is one
Ray task of ingest, and `readers.read_chunk` yields its items.

The files of a folder are ordered by the hash of their path below the source, not by name: files of
one class stand together in name order, and shards written so would give batches of one class.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import IngestConfig

CHUNK_ITEMS = 512
CHUNK_BYTES = 64 * 2**20

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

Kind = Literal["folder", "webdataset", "parquet"]


@dataclass(frozen=True)
class Entry:
    """One file of a source.

    Attributes:
        path: in its file system, without protocol.
        size: bytes; -1 for what is no regular file (a link to nothing, a pipe).
        tag: changes when the file does (ETag or modification time).
        label: class name from the folder; None for files at the top.
    """

    path: str
    size: int
    tag: str
    label: str | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of a source that one task reads.

    Attributes:
        kind: how to read it.
        protocol: fsspec's name of the file system.
        entries: files of a folder; or one tar, or one Parquet file.
        row_groups: Parquet only: [start, stop) of the file's row groups; empty when the file could
            not be opened.
        rows: Parquet only: [first, last + 1) of its rows in the file; a file that could not be
            opened counts as one row.
    """

    kind: Kind
    protocol: str
    entries: tuple[Entry, ...]
    row_groups: tuple[int, int] = (0, 0)
    rows: tuple[int, int] = (0, 1)

    def uri(self, entry: Entry) -> str:
        """Returns the address of `entry`."""
        return entry.path if self.protocol == "file" else f"{self.protocol}://{entry.path}"


@dataclass(frozen=True)
class Listing:
    """A source, cut into chunks.

    Attributes:
        kind: how it is read.
        chunks: in source order; the order decides which of two equal images stays.
        num_items: images, as far as known without reading; None for tars.
        num_bytes: bytes of all files.
        ignored: files that are no images by their names.
        classes: class names by index, when the source declares them (Hugging Face Parquet).
    """

    kind: Kind
    chunks: tuple[Chunk, ...]
    num_items: int | None
    num_bytes: int
    ignored: int = 0
    classes: tuple[str, ...] = ()


def list_source(cfg: IngestConfig) -> Listing:
    """Lists `cfg.source` and cuts it into chunks.

    Raises:
        ValueError: nothing to read there, or a Parquet file without the image column.
    """
    fs, root = fsspec.core.url_to_fs(cfg.source)
    fs.invalidate_cache()  # S3 listings are remembered by the process
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    entries, base = _find(fs, root.rstrip("/"), fs._strip_protocol(cfg.out))
    kind = _kind(entries, cfg)
    if kind == "folder":
        return _list_folder(entries, protocol, base)
    if kind == "webdataset":
        tars = [entry for entry in entries if entry.path.lower().endswith(TAR_SUFFIXES)]
        chunks = tuple(Chunk("webdataset", protocol, (tar,)) for tar in tars)
        return Listing("webdataset", chunks, None, sum(tar.size for tar in tars))
    return _list_parquet(fs, protocol, entries, cfg)


def _find(fs: Any, root: str, out: str) -> tuple[list[Entry], str]:
    """Returns every visible file below `root`, sorted by path, and the folder `root` stands for.

    Hidden files, and what lies below `out`, are passed over.
    """
    magic = re.search(r"[*?[]", root)
    if magic and not fs.exists(root):
        base = root[: root.rfind("/", 0, magic.start()) + 1]
        found: dict[str, dict[str, Any]] = fs.glob(root, detail=True)
    else:
        found = fs.find(root, detail=True)
        base = root.rpartition("/")[0] + "/" if root in found else root + "/"
    entries = []
    for path, info in sorted(found.items()):
        parts = path.removeprefix(base).split("/")
        hidden = any(part.startswith(".") for part in parts) or path.startswith(f"{out}/")
        if not hidden and info["type"] != "directory" and not path.endswith("/"):
            entries.append(_entry(path, info, parts[-2] if len(parts) > 1 else None))
    return entries, base


def _entry(path: str, info: dict[str, Any], label: str | None) -> Entry:
    tag = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
    size = -1 if info["type"] == "other" else int(info["size"] or 0)
    return Entry(path, size, str(tag), label)


def _kind(entries: list[Entry], cfg: IngestConfig) -> Kind:
    names = [entry.path.lower() for entry in entries]
    suffixes = {suffix_of(name) for name in names}
    kinds: list[tuple[Kind, bool]] = [
        ("folder", bool(suffixes & IMAGE_SUFFIXES)),
        ("webdataset", any(name.endswith(TAR_SUFFIXES) for name in names)),
        ("parquet", ".parquet" in suffixes),
        # Last, because tars and Parquet files have company without a suffix, like Spark's _SUCCESS.
        ("folder", "" in suffixes),
    ]
    for kind, present in kinds:
        if present and cfg.format in ("auto", kind):
            return kind
    wanted = "images, tars or Parquet files" if cfg.format == "auto" else cfg.format
    raise ValueError(f"--source: no {wanted} found at {cfg.source} ({len(entries)} files there)")


def suffix_of(path: str) -> str:
    """Returns the last suffix in lower case, as `PurePath.suffix` does but 10 times as fast."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _is_image(path: str) -> bool:
    """True for image suffixes and for names without any suffix (objects named by a hash)."""
    suffix = suffix_of(path)
    return not suffix or suffix in IMAGE_SUFFIXES


def _list_folder(entries: list[Entry], protocol: str, base: str) -> Listing:
    images = [entry for entry in entries if _is_image(entry.path)]
    keyed = [(_path_hash(entry.path.removeprefix(base)), entry) for entry in images]
    keyed.sort(key=lambda pair: (pair[0], pair[1].path))
    size = sum(max(entry.size, 0) for entry in images)
    # A power of two, cut by hash: a few new files change a few chunks, not all those after them.
    needed = max(len(images) / CHUNK_ITEMS, size / CHUNK_BYTES, 1)
    count = 1 << (int(needed - 1e-9)).bit_length()
    buckets: list[list[Entry]] = [[] for _ in range(count)]
    for key, entry in keyed:
        buckets[key * count >> 64].append(entry)
    chunks = tuple(Chunk("folder", protocol, tuple(bucket)) for bucket in buckets if bucket)
    return Listing("folder", chunks, len(images), size, len(entries) - len(images))


def _path_hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest())


def _list_parquet(fs: Any, protocol: str, entries: list[Entry], cfg: IngestConfig) -> Listing:
    files = [entry for entry in entries if entry.path.lower().endswith(".parquet")]
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(lambda entry: _footer(fs, entry.path), files))
    chunks: list[Chunk] = []
    classes: tuple[str, ...] = ()
    for entry, footer in zip(files, footers, strict=True):
        if footer is None:
            chunks.append(Chunk("parquet", protocol, (entry,)))
            continue
        schema = footer.schema.to_arrow_schema()
        if cfg.image_column not in schema.names:
            raise ValueError(f"--image-column: {entry.path} has only the columns {schema.names}")
        classes = classes or _declared_classes(schema, cfg.label_column)
        chunks += [Chunk("parquet", protocol, (entry,), *span) for span in _spans(footer)]
    rows = sum(chunk.rows[1] - chunk.rows[0] for chunk in chunks)
    size = sum(entry.size for entry in files)
    return Listing("parquet", tuple(chunks), rows, size, classes=classes)


def _footer(fs: Any, path: str) -> Any:
    try:
        with fs.open(path, "rb") as file:
            return pq.ParquetFile(file).metadata
    except (OSError, pa.ArrowException) as error:
        raise_if_unreachable(error)
        return None  # its one chunk reports it


def _spans(footer: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yields runs of row groups of about `CHUNK_BYTES`: ([start, stop) of groups, of rows)."""
    start, first, row, size = 0, 0, 0, 0
    for group in range(footer.num_row_groups):
        size += footer.row_group(group).total_byte_size
        row += footer.row_group(group).num_rows
        if size >= CHUNK_BYTES or group == footer.num_row_groups - 1:
            yield (start, group + 1), (first, row)
            start, first, size = group + 1, row, 0


def _declared_classes(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Returns the class names that Hugging Face `datasets` stores in the schema's metadata."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    feature = json.loads(text).get("info", {}).get("features", {}).get(column) or {}
    return tuple(feature.get("names") or ())


def raise_if_unreachable(error: BaseException) -> None:
    """Raises errors that say nothing about one object: quarantining them would lose good data."""
    passing = (errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENETUNREACH)
    ours = isinstance(error, OSError | EOFError | tarfile.TarError | zlib.error | pa.ArrowException)
    if not ours or isinstance(error, ConnectionError | TimeoutError):
        raise error
    if getattr(error, "errno", None) in passing:
        raise error
