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
import glob
import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.config import IngestConfig
from pipelines.config.ingest import LABEL_COLUMN
from pipelines.ingestion.entries import NO_FILE, UNLISTED, Entry, entry_of, local_entry
from pipelines.ingestion.failures import raise_if_unreachable as raise_if_unreachable
from pipelines.ingestion.folders import Found, walk, walk_matching
from pipelines.ingestion.media import Content, Modality, look_into, suffix_of, suffixes
from pipelines.ingestion.names import escaped
from pipelines.ingestion.parquet_listing import list_parquet, partition_label

CHUNK_ITEMS = 512
CHUNK_BYTES = 64 * 2**20
# A second of video costs as much as many images: about a minute of one core a chunk.
VIDEO_CHUNK_ITEMS = 32
VIDEO_CHUNK_BYTES = 8 * 2**20

# Beside NAME.mp4, one row a frame of it: NAME.actions.npy, NAME.states.npy.
SIDECARS = ("actions", "states")
TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.xz", ".txz", ".tar.zst", ".tzst"),
)

Kind = Literal["folder", "list", "webdataset", "parquet"]
MODALITIES: tuple[Modality, ...] = ("image", "video")
File = tuple[str, str, Entry]  # name below the source, protocol, and the file
_STREAMS = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "rtp")


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
        label_map: Parquet only: the class of each of the file's own indices; None: they are the same.
    """

    kind: Kind
    protocol: str
    entries: tuple[Entry, ...]
    row_groups: tuple[int, int] = (0, 0)
    rows: tuple[int, int] = (0, 1)
    label_map: tuple[int, ...] | None = None

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
        passed_over: how many files of which suffix are neither, by name and content.
        notes: what the user should know of how the source was read, a sentence each.
        classes: class names by index, when the source declares them (Hugging Face Parquet).
    """

    kind: Kind
    chunks: tuple[Chunk, ...]
    num_items: int | None
    num_bytes: int
    modality: Modality = "image"
    passed_over: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def ignored(self) -> int:
        """Number of files that are passed over."""
        return sum(count for _, count in self.passed_over)


def list_source(cfg: IngestConfig) -> Listing:
    """Lists `cfg.source` and cuts it into chunks.

    Raises:
        ValueError: nothing to read there, images and videos both and no word which, or a Parquet
            file without the image column, or without a label column that was named.
    """
    fs, root = _file_system(cfg.source)
    fs.invalidate_cache()  # S3 listings are remembered by the process
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    found, base = _find(fs, root.rstrip("/") or root, fs._strip_protocol(cfg.out))
    entries = found.files
    if not entries and not fs.exists(root):
        raise ValueError(f"--source: {cfg.source} does not exist")
    looked = _look(fs, entries, base)
    kind = _kind(entries, root, looked, cfg)
    if kind == "folder":
        files = [(entry.path.removeprefix(base), protocol, entry) for entry in entries]
        listing = _list_files(kind, files, looked, cfg)
        return dataclasses.replace(listing, notes=(*_notes(found), *listing.notes))
    if kind == "list":
        return _list_files(kind, _read_list(fs, entries[0].path, protocol), {}, cfg)
    if cfg.modality == "video":
        raise ValueError(f"--modality: videos are read from folders and lists, not from {kind}")
    if kind == "webdataset":
        tars = [entry for entry in entries if entry.path.lower().endswith(TAR_SUFFIXES)]
        chunks = tuple(Chunk("webdataset", protocol, (tar,)) for tar in tars)
        others = _counts([e for e in entries if not e.path.lower().endswith(TAR_SUFFIXES)])
        size = sum(tar.size for tar in tars)
        return Listing("webdataset", chunks, None, size, passed_over=others)
    return _list_parquet(fs, protocol, entries, cfg)


def _file_system(source: str) -> tuple[Any, str]:
    """Returns the file system of a source and its path there.

    Raises:
        ValueError: its protocol is none that is read here.
    """
    protocol, found, _ = source.partition("://")
    if found and "::" not in source:
        if protocol.lower() in _STREAMS:
            raise ValueError(f"--source: {source} is a live stream: add --follow")
        if protocol.lower() in ("http", "https"):
            raise ValueError(
                f"--source: {source} is a web address; download it and give the folder or file, "
                "or add --follow if it is a live stream"
            )
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            other = "write s3:// in lower case" if protocol.lower() == "s3" else "copy it there"
            raise ValueError(
                f"--source: {protocol}:// is not read ({source}); only local paths and s3:// are: "
                f"{other}"
            ) from error
    fs, root = fsspec.core.url_to_fs(source)
    return fs, root


def _find(fs: Any, root: str, out: str) -> tuple[Found, str]:
    """Returns every visible file below `root`, sorted by path, and the folder `root` stands for.

    Hidden files, and what lies below `out`, are passed over.
    """
    is_pattern = glob.has_magic(root) and not fs.exists(root)
    if isinstance(fs, LocalFileSystem):
        found, base = walk_matching(root, out) if is_pattern else _walk(root, out)
    else:
        found, base = _list_remote(fs, root, out, is_pattern=is_pattern)
    files = [_with_folder(entry, base) for entry in found.files]
    return dataclasses.replace(found, files=files), base


def _walk(root: str, out: str) -> tuple[Found, str]:
    try:
        entry = local_entry(root)
        if entry is not None:
            return Found([entry]), root.rpartition("/")[0] + "/"
        base = f"{root.rstrip('/')}/"
        return walk(base, out), base
    except FileNotFoundError:
        return Found(), root
    except PermissionError as error:
        raise ValueError(f"--source: {root} may not be listed by this user") from error


def _list_remote(fs: Any, root: str, out: str, *, is_pattern: bool) -> tuple[Found, str]:
    infos: dict[str, dict[str, Any]]
    if is_pattern:
        base = re.split("[*?[]", root)[0].rpartition("/")[0] + "/"
        infos = fs.glob(root, detail=True)
    else:
        infos = fs.find(root, detail=True)
        base = root.rpartition("/")[0] + "/" if root in infos else root + "/"
    found = Found()
    for path, info in sorted(infos.items()):
        parts = path.removeprefix(base).split("/")
        hidden = any(part.startswith(".") for part in parts) or path.startswith(f"{out}/")
        if not hidden and info["type"] != "directory" and not path.endswith("/"):
            found.files.append(entry_of(path, info))
    return found, base


def _with_folder(entry: Entry, base: str) -> Entry:
    folders = entry.path.removeprefix(base).split("/")[:-1]
    return dataclasses.replace(entry, label=folders[-1]) if folders else entry


def _notes(found: Found) -> Iterator[str]:
    if found.again:
        first, count = escaped(found.again[0]), len(found.again)
        yield f"{count} linked folders lead to what is in the source already: {first}, ..."
    if found.stored:
        yield f"{len(found.stored)} files without a suffix are taken by the links to them alone"


def _look(fs: Any, entries: list[Entry], base: str) -> dict[str, Content]:
    """Returns what the files are whose suffix does not say it, by path."""
    known = frozenset().union(*(suffixes(modality) for modality in MODALITIES))
    unknown = [entry for entry in entries if suffix_of(entry.path) not in known]
    return look_into(fs, sorted(unknown, key=lambda e: _path_hash(e.path.removeprefix(base))))


def _kind(entries: list[Entry], root: str, looked: dict[str, Content], cfg: IngestConfig) -> Kind:
    names = [entry.path.lower() for entry in entries]
    found = {suffix_of(name) for name in names}
    kinds: list[tuple[Kind, bool]] = [
        ("list", len(names) == 1 and names[0].endswith(".csv")),
        ("folder", any(found & suffixes(modality) for modality in MODALITIES)),
        ("webdataset", any(name.endswith(TAR_SUFFIXES) for name in names)),
        ("parquet", ".parquet" in found),
        # Last, because tars and Parquet files have company of any name, like Spark's _SUCCESS.
        (
            "folder",
            any(_is_item(entry, modality, looked) for entry in entries for modality in MODALITIES),
        ),
    ]
    for kind, present in kinds:
        if present and cfg.format in ("auto", kind):
            return kind
    wanted = "images, videos, tars or Parquet files" if cfg.format == "auto" else cfg.format
    raise ValueError(f"--source: no {wanted} found at {cfg.source} ({_told(_counts(entries))})")


def _is_item(entry: Entry, modality: Modality, looked: dict[str, Content]) -> bool:
    """True for a file of a folder that is of this modality by suffix or content.

    Likewise for one without a suffix that may be: objects named by a hash have none, and what is
    damaged among them is to be reported.
    """
    suffix = suffix_of(entry.path)
    if suffix in suffixes(modality) or entry.size == UNLISTED:
        return True
    if any(suffix in suffixes(other) for other in MODALITIES):
        return False
    content = looked.get(entry.path, "")
    return content == modality or (not suffix and content == "")


def _is_named_item(entry: Entry, modality: Modality) -> bool:
    """True for a file that a list names, unless its suffix is one of another modality."""
    suffix = suffix_of(entry.path)
    others = any(suffix in suffixes(other) for other in MODALITIES if other != modality)
    sidecar = any(entry.path.endswith(f".{name}.npy") for name in SIDECARS)
    return suffix in suffixes(modality) or not (others or sidecar)


def _counts(entries: Iterable[Entry]) -> tuple[tuple[str, int], ...]:
    """Returns how many files there are of each suffix, the commonest first."""
    names = Counter(suffix_of(entry.path) or "without a suffix" for entry in entries)
    return tuple(sorted(names.items(), key=lambda item: (-item[1], item[0])))


def _told(counts: tuple[tuple[str, int], ...]) -> str:
    total = sum(count for _, count in counts)
    shown = ", ".join(f"{count} {escaped(suffix)}" for suffix, count in counts[:8])
    return f"{total} files there" + (f": {shown}" if shown else "")


def _modality(entries: list[Entry], looked: dict[str, Content], cfg: IngestConfig) -> Modality:
    if cfg.modality != "auto":
        return cfg.modality
    found = {suffix_of(entry.path) for entry in entries} - {".gif"}  # either
    images, videos = (bool(found & suffixes(modality)) for modality in MODALITIES)
    if not (images or videos):
        images, videos = ("image" in looked.values(), "video" in looked.values())
    if images and videos:
        raise ValueError(f"--modality: both images and videos at {cfg.source}: say which to take")
    return "video" if videos else "image"


def _list_files(
    kind: Kind, files: list[File], looked: dict[str, Content], cfg: IngestConfig
) -> Listing:
    """Cuts files into chunks: (name below the source, protocol, entry) each."""
    modality = _modality([entry for _, _, entry in files], looked, cfg)
    files = _with_sidecars(files) if modality == "video" else files
    named = kind == "list"
    wanted, passed = list[File](), list[Entry]()
    for file in files:
        entry = file[2]
        if _is_named_item(entry, modality) if named else _is_item(entry, modality, looked):
            wanted.append(file)
        else:
            passed.append(entry)
    counts = _counts(passed)
    if not wanted:
        raise ValueError(f"--source: no {modality}s found at {cfg.source} ({_told(counts)})")
    size = sum(max(entry.size, 0) for _, _, entry in wanted)
    chunks = _cut(kind, wanted, size, modality)
    return Listing(kind, chunks, len(wanted), size, modality, counts)


def _cut(kind: Kind, files: list[File], size: int, modality: Modality) -> tuple[Chunk, ...]:
    """Cuts files into a power of two of chunks by hash: few new files change few chunks."""
    keyed = [(_path_hash(name), protocol, entry) for name, protocol, entry in files]
    keyed.sort(key=lambda file: (file[0], file[2].path))
    items, bytes_ = CHUNK_ITEMS, CHUNK_BYTES
    if modality == "video":
        items, bytes_ = VIDEO_CHUNK_ITEMS, VIDEO_CHUNK_BYTES
    needed = max(len(keyed) / items, size / bytes_, 1)
    count = 1 << (int(needed - 1e-9)).bit_length()
    buckets: dict[tuple[int, str], list[Entry]] = {}
    for key, protocol, entry in keyed:
        buckets.setdefault((key * count >> 64, protocol), []).append(entry)
    return tuple(Chunk(kind, at[1], tuple(bucket)) for at, bucket in buckets.items())


def _with_sidecars(files: list[File]) -> list[File]:
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
        entry = there.get((kind, name), Entry(name, NO_FILE, ""))
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
        return {(protocol, entry.path): entry for entry in _list_folder(protocol, folder)}

    with ThreadPoolExecutor(16) as pool:
        return {key: entry for found in pool.map(files, folders) for key, entry in found.items()}


def _list_folder(protocol: str, folder: str) -> Iterator[Entry]:
    fs = fsspec.filesystem(protocol)
    try:
        infos = fs.ls(folder, detail=not isinstance(fs, LocalFileSystem))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for info in infos:
        if isinstance(info, str):  # fsspec does not say what a link leads to
            entry = local_entry(info)
            if entry is not None:
                yield entry
        elif info["type"] != "directory":
            yield entry_of(info["name"], info)


def _path_hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(escaped(path).encode(), digest_size=8).digest())


def _list_parquet(fs: Any, protocol: str, entries: list[Entry], cfg: IngestConfig) -> Listing:
    files = [entry for entry in entries if entry.path.lower().endswith(".parquet")]
    others = [entry for entry in entries if not entry.path.lower().endswith(".parquet")]
    found = list_parquet(fs, [entry.path for entry in files], cfg, CHUNK_BYTES)
    column = cfg.label_column or LABEL_COLUMN
    labels = [partition_label(entry.path, column) for entry in files]
    files = [dataclasses.replace(e, label=label) for e, label in zip(files, labels, strict=True)]
    chunks = tuple(
        Chunk("parquet", protocol, (files[p.file],), p.row_groups, p.rows, p.label_map)
        for p in found.pieces
    )
    return Listing(
        kind="parquet",
        chunks=chunks,
        num_items=found.num_items,
        num_bytes=sum(entry.size for entry in files),
        passed_over=_counts(others),
        classes=found.classes,
        notes=found.notes,
    )
