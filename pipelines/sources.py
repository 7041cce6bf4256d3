"""Where raw images and videos come from: folders, CSV lists, WebDataset tars and Parquet files.

All of them local or on S3; videos come from folders and lists only.

`list_source` cuts a source into chunks, always the same ones for the same listing; a chunk is one
Ray task of ingest, and `readers.read_chunk` yields its items.

The files of a folder are ordered by the hash of their path below the source, not by name: files of
one class stand together in name order, and shards written so would give batches of one class.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import json
import posixpath
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
# A second of video costs as much as many images: about a minute of one core a chunk.
VIDEO_CHUNK_ITEMS = 32
VIDEO_CHUNK_BYTES = 8 * 2**20

SUFFIXES = {
    "image": frozenset(
        [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
    ),
    "video": frozenset([".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"]),
}
IMAGE_SUFFIXES = SUFFIXES["image"]
# Beside NAME.mp4, one row a frame of it: NAME.actions.npy, NAME.states.npy.
SIDECARS = ("actions", "states")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

Kind = Literal["folder", "list", "webdataset", "parquet"]
Modality = Literal["image", "video"]


@dataclass(frozen=True)
class Entry:
    """One file of a source.

    Attributes:
        path: in its file system, without protocol.
        size: bytes; -1 for what is no regular file (a link to nothing, a pipe).
        tag: changes when the file does (ETag or modification time).
        label: class name from the folder, or as the list has it; None for files at the top.
        sidecars: which of `SIDECARS` lie beside it.
    """

    path: str
    size: int
    tag: str
    label: str | None = None
    sidecars: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of a source that one task reads.

    Attributes:
        kind: how to read it.
        protocol: fsspec's name of the file system.
        entries: files of a folder or list; or one tar, or one Parquet file.
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
        num_items: images or videos, as far as known without reading; None for tars.
        num_bytes: bytes of all files.
        modality: what the items are.
        ignored: files that are neither by their names.
        classes: class names by index, when the source declares them (Hugging Face Parquet).
    """

    kind: Kind
    chunks: tuple[Chunk, ...]
    num_items: int | None
    num_bytes: int
    modality: Modality = "image"
    ignored: int = 0
    classes: tuple[str, ...] = ()


def list_source(cfg: IngestConfig) -> Listing:
    """Lists `cfg.source` and cuts it into chunks.

    Raises:
        ValueError: nothing to read there, images and videos both and no word which, or a Parquet
            file without the image column.
    """
    fs, root = fsspec.core.url_to_fs(cfg.source)
    fs.invalidate_cache()  # S3 listings are remembered by the process
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    entries, base = _find(fs, root.rstrip("/"), fs._strip_protocol(cfg.out))
    kind = _kind(entries, cfg)
    if kind == "folder":
        keyed = [(entry.path.removeprefix(base), entry) for entry in entries]
        return _list_files(kind, [(name, protocol, entry) for name, entry in keyed], cfg)
    if kind == "list":
        return _list_files(kind, _read_list(fs, entries[0].path, protocol), cfg)
    if cfg.modality == "video":
        raise ValueError(f"--modality: videos are read from folders and lists, not from {kind}")
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
        ("list", len(names) == 1 and names[0].endswith(".csv")),
        ("folder", any(suffixes & known for known in SUFFIXES.values())),
        ("webdataset", any(name.endswith(TAR_SUFFIXES) for name in names)),
        ("parquet", ".parquet" in suffixes),
        # Last, because tars and Parquet files have company without a suffix, like Spark's _SUCCESS.
        ("folder", "" in suffixes),
    ]
    for kind, present in kinds:
        if present and cfg.format in ("auto", kind):
            return kind
    wanted = "images, tars or Parquet files, nor videos," if cfg.format == "auto" else cfg.format
    raise ValueError(f"--source: no {wanted} found at {cfg.source} ({len(entries)} files there)")


def suffix_of(path: str) -> str:
    """Returns the last suffix in lower case, as `PurePath.suffix` does but 10 times as fast."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _is_media(path: str, *modalities: str) -> bool:
    """True for suffixes of those modalities (of all, without any named), and for no suffix at all.

    Objects named by a hash have none.
    """
    suffix = suffix_of(path)
    return not suffix or any(suffix in SUFFIXES[name] for name in modalities or SUFFIXES)


def _modality(names: list[str], cfg: IngestConfig) -> Modality:
    if cfg.modality != "auto":
        return cfg.modality
    suffixes = {suffix_of(name) for name in names} - {".gif"}  # either
    images, videos = (bool(suffixes & SUFFIXES[name]) for name in ("image", "video"))
    if images and videos:
        raise ValueError(f"--modality: both images and videos at {cfg.source}: say which to take")
    return "video" if videos else "image"


def _list_files(kind: Kind, files: list[tuple[str, str, Entry]], cfg: IngestConfig) -> Listing:
    """Cuts files into chunks: (name below the source, protocol, entry) each."""
    modality = _modality([entry.path for _, _, entry in files], cfg)
    files = _with_sidecars(files) if modality == "video" else files
    wanted = [file for file in files if _is_media(file[2].path, modality)]
    keyed = [(_path_hash(name), protocol, entry) for name, protocol, entry in wanted]
    keyed.sort(key=lambda file: (file[0], file[2].path))
    size = sum(max(entry.size, 0) for _, _, entry in keyed)
    # A power of two, cut by hash: a few new files change a few chunks, not all those after them.
    items, bytes_ = CHUNK_ITEMS, CHUNK_BYTES
    if modality == "video":
        items, bytes_ = VIDEO_CHUNK_ITEMS, VIDEO_CHUNK_BYTES
    needed = max(len(keyed) / items, size / bytes_, 1)
    count = 1 << (int(needed - 1e-9)).bit_length()
    buckets: dict[tuple[int, str], list[Entry]] = {}
    for key, protocol, entry in keyed:
        buckets.setdefault((key * count >> 64, protocol), []).append(entry)
    chunks = tuple(Chunk(kind, at[1], tuple(bucket)) for at, bucket in buckets.items())
    if not chunks:
        raise ValueError(f"--source: no {modality}s found at {cfg.source} ({len(files)} files)")
    return Listing(kind, chunks, len(keyed), size, modality, len(files) - len(keyed))


def _with_sidecars(files: list[tuple[str, str, Entry]]) -> list[tuple[str, str, Entry]]:
    """Takes sidecars out of the files and notes them, and their tags, at the files they are of."""
    tags = {(protocol, entry.path): entry.tag for _, protocol, entry in files}
    paths = {sidecar_path(entry.path, name) for _, _, entry in files for name in SIDECARS}
    found = []
    for name, protocol, entry in files:
        if entry.path in paths:
            continue
        beside = [(s, tags.get((protocol, sidecar_path(entry.path, s)))) for s in SIDECARS]
        present = [(sidecar, tag) for sidecar, tag in beside if tag is not None]
        tag = "|".join([entry.tag, *(tag for _, tag in present)])
        sidecars = tuple(sidecar for sidecar, _ in present)
        found.append((name, protocol, dataclasses.replace(entry, tag=tag, sidecars=sidecars)))
    return found


def sidecar_path(path: str, name: str) -> str:
    """Returns where the sidecar `name` of the file at `path` lies."""
    return f"{path[: len(path) - len(suffix_of(path))]}.{name}.npy"


def _read_list(fs: Any, path: str, protocol: str) -> list[tuple[str, str, Entry]]:
    """Reads a CSV of `path` or `path,label` rows, with or without that line as its first.

    Paths are relative to the list's folder, absolute, or URIs. A file that is not there is an entry
    without a size, which the reader reports.
    """
    with fs.open(path, "r", newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    rows = rows[rows[:1] in ([["path"]], [["path", "label"]]) :]
    if not rows:
        raise ValueError(f"--source: the list {path} names no file")
    places = [_place(row[0].strip(), path.rpartition("/")[0], protocol) for row in rows]
    there = _list_parents(places)
    found: list[tuple[str, str, Entry]] = []
    for row, (kind, name) in zip(rows, places, strict=True):
        label = row[1].strip() or None if len(row) > 1 else None
        entry = there.get((kind, name), Entry(name, -1, ""))
        found.append((row[0], kind, dataclasses.replace(entry, label=label)))
        beside = [(kind, sidecar_path(name, sidecar)) for sidecar in SIDECARS]
        found += [(at[1], kind, there[at]) for at in beside if at in there]
    return found


def _place(name: str, folder: str, protocol: str) -> tuple[str, str]:
    """Returns (protocol, path in its file system) of a list's entry."""
    if "://" in name:
        fs, path = fsspec.core.url_to_fs(name)
        return (fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]), path
    return protocol, posixpath.normpath(posixpath.join(folder, name))


def _list_parents(places: list[tuple[str, str]]) -> dict[tuple[str, str], Entry]:
    """Returns every file in the folders of these places, by place: one listing a folder."""
    folders = sorted({(protocol, path.rpartition("/")[0]) for protocol, path in places})

    def files(place: tuple[str, str]) -> dict[tuple[str, str], Entry]:
        protocol, folder = place
        try:
            infos = fsspec.filesystem(protocol).ls(folder, detail=True)
        except FileNotFoundError:
            return {}
        named = [(info["name"], info) for info in infos if info["type"] != "directory"]
        return {(protocol, name): _entry(name, info, None) for name, info in named}

    with ThreadPoolExecutor(16) as pool:
        return {key: entry for found in pool.map(files, folders) for key, entry in found.items()}


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
