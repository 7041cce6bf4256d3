"""Where raw images and videos come from: folders, CSV lists, WebDataset tars and Parquet files.

All of them local or on S3; videos come from folders and lists only.

`list_source` cuts a source into chunks, always the same ones for the same listing; a chunk is one
Ray task of ingest, and `readers.read_chunk` yields its items.

The files of a folder are ordered by the hash of their path below the source, not by name: files of
one class stand together in name order, and shards written so would give batches of one class.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config.ingest import IMAGE_COLUMN, LABEL_COLUMN, IngestConfig
from pipelines.ingestion.entries.addresses import open_address
from pipelines.ingestion.entries.entries import Entry as Entry
from pipelines.ingestion.entries.failures import raise_if_unreachable as raise_if_unreachable
from pipelines.ingestion.listing.choosing import (
    MODALITIES,
    SIDECARS,
    Counts,
    count_suffixes,
    find_modality,
    is_item,
    is_named_item,
    says_what_it_is,
    told,
)
from pipelines.ingestion.listing.finding import find, notes_of
from pipelines.ingestion.listing.folder_classes import folder_labels
from pipelines.ingestion.listing.folders import Found
from pipelines.ingestion.listing.lists import File, find_listed, metadata_labels
from pipelines.ingestion.listing.media import Content, Modality, look_into, suffix_of
from pipelines.ingestion.listing.parquet_listing import list_parquet, partition_label
from pipelines.ingestion.listing.tables import LIST_SUFFIXES, FileList, read_file_list
from pipelines.runtime.names import escaped
from pipelines.runtime.uris import protocol_of

CHUNK_ITEMS = 512
CHUNK_BYTES = 64 * 2**20
# A second of video costs as much as many images: about a minute of one core a chunk.
VIDEO_CHUNK_ITEMS = 32
VIDEO_CHUNK_BYTES = 8 * 2**20

TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.xz", ".txz", ".tar.zst", ".tzst"),
)
# Hugging Face's imagefolder: labels of the files below it.
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
# Archives that are not read.
OTHER_ARCHIVES = (
    *(".zip", ".7z", ".rar", ".lz4", ".lz", ".lzo", ".lzma", ".z", ".cpio"),
    *(".gz", ".bz2", ".xz", ".zst"),
)

Kind = Literal["folder", "list", "webdataset", "parquet"]


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
        passed_over: how many files of which suffix are neither images nor videos.
        notes: what the user should know of how the source was read, a sentence each.
        classes: class names by index, when the source declares them (Hugging Face Parquet).
    """

    kind: Kind
    chunks: tuple[Chunk, ...]
    num_items: int | None
    num_bytes: int
    modality: Modality = "image"
    passed_over: Counts = ()
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
    fs, root = open_address(cfg.source)
    found, base = find(fs, root, fs._strip_protocol(cfg.out))
    entries = found.files
    if not entries and not fs.exists(root):
        raise ValueError(f"--source: {cfg.source} does not exist")
    looked = _look(fs, entries, base)
    kind = _kind(entries, root, looked, cfg)
    if cfg.image_member and kind != "webdataset":
        raise ValueError(f"--image-member: goes with tars, and {cfg.source} is a {kind}")
    if kind == "folder":
        return _list_folder(fs, found, base, looked, cfg)
    if cfg.class_level is not None:
        raise ValueError(f"--class-level: goes with folders of files, and {cfg.source} is a {kind}")
    if kind == "list":
        return _list_listed(fs, entries[0].path, cfg)
    listing = _list_archives(fs, kind, entries, cfg)
    return dataclasses.replace(listing, notes=(*notes_of(found), *listing.notes))


def _list_archives(fs: Any, kind: Kind, entries: list[Entry], cfg: IngestConfig) -> Listing:
    """Lists tars or Parquet files."""
    protocol = protocol_of(fs)
    if cfg.modality == "video":
        raise ValueError(f"--modality: videos are read from folders and lists, not from {kind}")
    if kind == "webdataset":
        tars, others = _named(entries, TAR_SUFFIXES)
        chunks = tuple(Chunk("webdataset", protocol, (tar,)) for tar in tars)
        size = sum(tar.size for tar in tars)
        return Listing("webdataset", chunks, None, size, passed_over=count_suffixes(others))
    return _list_parquet(fs, protocol, entries, cfg)


def _named(entries: list[Entry], suffixes: tuple[str, ...]) -> tuple[list[Entry], list[Entry]]:
    """Returns the files with one of these suffixes, or the only one there is, and the others."""
    if len(entries) == 1:
        return entries, []
    named = [entry for entry in entries if entry.path.lower().endswith(suffixes)]
    return named, [entry for entry in entries if not entry.path.lower().endswith(suffixes)]


def _look(fs: Any, entries: list[Entry], base: str) -> dict[str, Content]:
    """Returns what the files are whose suffix does not say it, by path."""
    unknown = [entry for entry in entries if not says_what_it_is(entry.path)]
    return look_into(fs, sorted(unknown, key=lambda e: _path_hash(e.path.removeprefix(base))))


def _kind(entries: list[Entry], root: str, looked: dict[str, Content], cfg: IngestConfig) -> Kind:
    names = [entry.path.lower() for entry in entries]
    found = {suffix_of(name) for name in names}
    alone = len(entries) == 1 and entries[0].path == root  # the source is one file
    is_list = alone and (cfg.format == "list" or names[0].endswith(LIST_SUFFIXES))
    any_items = any(is_item(e, modality, looked) for e in entries for modality in MODALITIES)
    kinds: list[tuple[Kind, bool]] = [
        ("list", is_list or (len(names) == 1 and names[0].endswith(".csv"))),
        ("folder", any(says_what_it_is(name) for name in names)),
        ("webdataset", any(name.endswith(TAR_SUFFIXES) for name in names)),
        ("parquet", ".parquet" in found),
        # Last, because tars and Parquet files have company of any name, like Spark's _SUCCESS.
        ("folder", any_items),
    ]
    for kind, present in kinds:
        if (present or (alone and kind == cfg.format)) and cfg.format in ("auto", kind):
            return kind
    wanted = "images, videos, tars or Parquet files" if cfg.format == "auto" else cfg.format
    there = told(count_suffixes(entries))
    archives = [entry.path for entry in entries if entry.path.lower().endswith(OTHER_ARCHIVES)]
    way_out = (
        f"; unpack {archives[0]}, or pack it as .tar (.gz, .bz2, .xz, .zst)" if archives else ""
    )
    raise ValueError(f"--source: no {wanted} found at {cfg.source} ({there}){way_out}")


def _list_folder(
    fs: Any, found: Found, base: str, looked: dict[str, Content], cfg: IngestConfig
) -> Listing:
    """Lists the files of a folder, with the labels of its `metadata` files or of its folders."""
    protocol = protocol_of(fs)
    files = [(entry.path.removeprefix(base), protocol, entry) for entry in found.files]
    modality = _modality(found.files, looked, cfg)
    items, passed = _select(files, modality, lambda entry: is_item(entry, modality, looked))
    kind: Kind = "folder"
    labels, notes = folder_labels([name for name, _, _ in items], cfg.class_level)
    if cfg.class_level is None:
        given, told_of_them = _metadata(fs, found.files, {e.path for _, _, e in items}, cfg)
        notes = (*told_of_them, *(() if given else notes))
        if given:
            kind = "list"  # its labels may be indices
            labels = [given.get(entry.path) for _, _, entry in items]
    if kind == "folder" and cfg.label_column is not None:
        raise ValueError(
            f"--label-column: {cfg.source} is a folder of files without metadata.csv or "
            "metadata.jsonl: its classes are its folders"
        )
    items = [
        (name, protocol, entry if entry.label == label else dataclasses.replace(entry, label=label))
        for (name, _, entry), label in zip(items, labels, strict=True)
    ]
    return _listing(kind, items, passed, modality, (*notes_of(found), *notes), cfg)


def _metadata(
    fs: Any, files: list[Entry], items: set[str], cfg: IngestConfig
) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """Returns the labels by path that `metadata` files of a folder give, and notes."""
    labels: dict[str, str | None] = {}
    notes: list[str] = []
    for entry in files:
        if entry.path.rpartition("/")[2].lower() not in METADATA_NAMES:
            continue
        try:
            listed = _read_list(fs, entry.path, cfg)
        except ValueError as error:
            if not str(error).startswith("--source"):  # a column that was asked for
                raise
            notes.append(f"not used for labels: {str(error).removeprefix('--source: ')}")
            continue
        found, lost = metadata_labels(listed, entry.path, protocol_of(fs), items)
        if found and listed.labelled:
            labels |= found
            notes.append(f"labels of {len(found)} files are those in {escaped(entry.path)}")
        if found:
            notes += listed.notes
        if found and lost:
            notes.append(f"{lost} files that {escaped(entry.path)} names are not there")
    if labels and len(labels) < len(items):
        notes.append(f"{len(items) - len(labels)} files are in no metadata file: unlabelled")
    return labels, tuple(notes)


def _list_listed(fs: Any, path: str, cfg: IngestConfig) -> Listing:
    """Lists the files that the list at `path` names."""
    listed = _read_list(fs, path, cfg)
    endings = tuple(f".{name}.npy" for name in SIDECARS)
    files = find_listed(listed, path, protocol_of(fs), endings)
    modality = _modality([entry for _, _, entry in files], {}, cfg)
    items, passed = _select(files, modality, lambda entry: is_named_item(entry, modality))
    return _listing("list", items, passed, modality, listed.notes, cfg)


def _read_list(fs: Any, path: str, cfg: IngestConfig) -> FileList:
    image = cfg.image_column if cfg.image_column != IMAGE_COLUMN else ""
    name = escaped(path.rpartition("/")[2])
    return read_file_list(
        fs.cat_file(path), name, path_column=image, label_column=cfg.label_column or ""
    )


def _modality(entries: list[Entry], looked: dict[str, Content], cfg: IngestConfig) -> Modality:
    if cfg.modality != "auto":
        return cfg.modality
    modality = find_modality(entries, looked)
    if modality is None:
        raise ValueError(f"--modality: both images and videos at {cfg.source}: say which to take")
    return modality


def _select(
    files: list[File], modality: Modality, wanted: Callable[[Entry], bool]
) -> tuple[list[File], Counts]:
    """Returns the files that are items, and the number of others by suffix."""
    files = _with_sidecars(files) if modality == "video" else files
    items, passed = list[File](), list[Entry]()
    for file in files:
        if wanted(file[2]):
            items.append(file)
        else:
            passed.append(file[2])
    return items, count_suffixes(passed)


def _listing(
    kind: Kind,
    items: list[File],
    passed: Counts,
    modality: Modality,
    notes: tuple[str, ...],
    cfg: IngestConfig,
) -> Listing:
    if not items:
        raise ValueError(f"--source: no {modality}s found at {cfg.source} ({told(passed)})")
    size = sum(max(entry.size, 0) for _, _, entry in items)
    chunks = _cut(kind, items, size, modality)
    return Listing(kind, chunks, len(items), size, modality, passed, notes)


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


def _path_hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(escaped(path).encode(), digest_size=8).digest())


def _list_parquet(fs: Any, protocol: str, entries: list[Entry], cfg: IngestConfig) -> Listing:
    files, others = _named(entries, (".parquet",))
    found = list_parquet(fs, [entry.path for entry in files], cfg, CHUNK_BYTES)
    if all(piece.rows[0] == piece.rows[1] for piece in found.pieces):
        raise ValueError(f"--source: the Parquet files at {cfg.source} have no rows")
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
        passed_over=count_suffixes(others),
        classes=found.classes,
        notes=found.notes,
    )
