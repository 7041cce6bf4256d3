"""Reads a tar front to back: images become items, labels are matched, the rest is counted by kind.

Archives may be compressed, appended to, or joined end to end. Nothing is unpacked to a disk.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

import pyarrow as pa

from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.chunks import Chunk
from pipelines.ingestion.entries.failures import DAMAGE, problem_of, too_many_bytes
from pipelines.ingestion.listing.media import HEAD_BYTES, content_of, suffix_of, suffixes
from pipelines.ingestion.reading.items import Item, Problem, Tally
from pipelines.ingestion.reading.labels import LABEL_SUFFIXES, LabelError, label_in_file
from pipelines.ingestion.reading.tar_samples import LabelFile, Picture, Samples, gives_way, key_of

READ_BYTES = 2**15  # tarfile copies what is left of it at every read
AVAILABLE_BYTES = 2**15
HELD_BYTES = 32 * 2**20
_OPENERS: tuple[tuple[bytes, Callable[[IO[bytes]], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x28\xb5\x2f\xfd", partial(pa.CompressedInputStream, compression="zstd")),
)
_ABOVE_ROOT = re.compile(r"^(/+|(\.\./)+)")
_GNU_MAGIC = b"ustar  \0"
# What macOS and old tars put beside the files themselves.
_FOREIGN_FOLDER = re.compile(r"__MACOSX|PaxHeaders?(\.[0-9]+)?")


def read_tar(fs: Any, chunk: Chunk, cfg: IngestConfig, tally: Tally) -> Iterator[Item]:
    """Yields the images of one tar file; their labels come into `tally`, behind the last one."""
    uri = chunk.uri(chunk.entries[0])
    contents = _Contents(uri, cfg, tally)
    damage: Problem | None = None
    try:
        with (
            fs.open(chunk.entries[0].path, "rb") as file,
            _decompressed(file) as stream,
            tarfile.open(
                fileobj=stream,
                mode="r|",
                bufsize=READ_BYTES,
                tarinfo=_StrictTarInfo,
                ignore_zeros=True,  # another archive may follow
            ) as tar,
        ):
            for member, archive in _members(tar):
                yield from contents.items(tar, member, archive)
    except DAMAGE as error:
        damage = problem_of(error, "corrupt_archive")
    yield from contents.rest()
    if damage is not None:
        detail = f"{damage[1]} (after {len(contents.samples.pictures)} images)"
        yield Item(uri, problem=(damage[0], detail))
    contents.samples.finish(tally)
    if not cfg.image_member:
        tally.notes += Counter({"images that share a sample": contents.samples.sharing()})


@contextlib.contextmanager
def _decompressed(file: IO[bytes]) -> Iterator[Any]:
    """Yields the uncompressed tar in `file`; several compressed files may be joined end to end."""
    head = file.read(6)
    file.seek(0)
    for magic, opener in _OPENERS:
        if head.startswith(magic):
            with opener(file) as stream:
                yield _Available(stream)
            return
    yield file


class _Available:
    """A decompressed file, read as far as it has been decompressed: what stands before damage."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read1(min(size, AVAILABLE_BYTES))
        return data


_BAD_EXTENSION = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.SubsequentHeaderError,  # type: ignore[attr-defined]
)


class _StrictTarInfo(tarfile.TarInfo):
    """A damaged header is an error; tarfile takes it for the end of the file, or passes over it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):  # not the zero blocks at the end
                raise tarfile.ReadError(f"bad member header: {error}") from error
            raise
        if buf[257:265] == _GNU_MAGIC:  # has times where tarfile looks for the name's beginning
            prefix = bytes(buf[345:500]).partition(b"\0")[0].decode(encoding, errors)
            member.name = member.name.removeprefix(f"{prefix}/")
        return member

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(archive)
        except _BAD_EXTENSION as error:
            raise tarfile.ReadError(f"bad member header: {error}") from error


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yields every member with the number of its archive in the file; zero blocks end one."""
    archive = end = 0
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all
        archive += member.offset > end
        end = tar.offset
        yield member, archive


def _path_of(name: str) -> str:
    """Returns a member's path from the archive's root, also of names with Windows' separators."""
    slashed = name if "/" in name else name.replace("\\", "/")
    return _ABOVE_ROOT.sub("", posixpath.normpath(slashed))


class _Contents:
    """What one tar file holds.

    Attributes:
        samples: names of images, label files with what is in them.
    """

    def __init__(self, uri: str, cfg: IngestConfig, tally: Tally) -> None:
        self.samples = Samples()
        self._uri, self._tally, self._max_bytes = uri, tally, cfg.max_bytes
        self._wanted = tuple(pattern.lower().lstrip("*.") for pattern in cfg.image_member)
        self._endings = tuple(f".{pattern}" for pattern in self._wanted)
        self._addresses: set[str] = set()
        self._paths: set[str] = set()
        self._labels: dict[str, LabelFile] = {}
        self._number = 0
        self._links: list[tuple[tarfile.TarInfo, str, int]] = []
        self._held: list[tuple[Item, str, int]] = []
        self._stems_taken: set[str] = set()

    def items(self, tar: tarfile.TarFile, member: tarfile.TarInfo, archive: int) -> Iterator[Item]:
        """Yields the images that are there once `member` has been read."""
        path = _path_of(member.name)
        *folders, name = path.split("/")
        if member.isdir():
            self._tally.ignored["folder"] += 1
        elif any(part.startswith(".") for part in (*folders, name)) or any(
            _FOREIGN_FOLDER.fullmatch(folder) for folder in folders
        ):
            self._tally.ignored["hidden"] += 1
        elif member.issym() or member.islnk():
            self._links.append((member, path, archive))
        else:
            self._paths.add(path)
            if suffix_of(path) in LABEL_SUFFIXES and not self._is_wanted(path):
                self._read_label(tar, member, path, archive)
            else:
                yield from self._picture(tar, member, path, archive)

    def rest(self) -> Iterator[Item]:
        """Yields what could only be decided at the end."""
        yield from self._release()
        for member, path, archive in self._links:
            yield from self._link(member, path, archive)

    def _is_wanted(self, path: str) -> bool:
        return path.lower().endswith(self._endings)

    def _read_label(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, archive: int
    ) -> None:
        label = LabelFile(path, archive, None, None)
        try:
            there, label.label = label_in_file(suffix_of(path), self._open(tar, member).read())
        except LabelError as error:
            there, label.problem = True, (error.reason, f"{path}: {error.detail}")
        except _Refused as error:
            there, label.problem = True, error.problem
        if there:
            self._labels[path] = label
            self.samples.labels.append(label)
        else:
            self._tally.ignored[suffix_of(path)] += 1

    def _picture(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, archive: int
    ) -> Iterator[Item]:
        suffix = suffix_of(path)
        named = suffix in suffixes("image")
        if self._wanted and not self._is_wanted(path):
            self._tally.ignored["other picture" if named else suffix or "no suffix"] += 1
            return
        data, problem = b"", None
        sure = named or bool(self._wanted)
        try:
            file = self._open(tar, member)
            data = b"" if sure else file.read(HEAD_BYTES)
            sure = sure or content_of(data, named=bool(suffix)) == "image"
            data += file.read() if sure else b""
        except _Refused as error:
            problem = error.problem
        if sure:
            item = Item(self._address(member.name), data, problem=problem)
            yield from self._hold(item, path, archive)
        else:
            self._tally.ignored[suffix or ("special file" if problem else "no suffix")] += 1

    def _open(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
        """Opens a member that may be read.

        Raises:
            _Refused: it is no regular file, or too large.
        """
        if member.size > self._max_bytes:
            raise _Refused(too_many_bytes(member.size, self._max_bytes))
        file = tar.extractfile(member) if member.isfile() else None
        if file is None:
            raise _Refused(("unreadable", "no regular file"))
        return file

    def _address(self, name: str) -> str:
        """Returns the address of a member; those of equal names are told apart by a number."""
        address, copy = f"{self._uri}#{name}", 1
        while address in self._addresses:
            copy += 1
            address = f"{self._uri}#{name}#{copy}"
        self._addresses.add(address)
        return address

    def _hold(self, item: Item, path: str, archive: int) -> Iterator[Item]:
        """Passes images on; with --image-member those of one name together, so as to choose."""
        held = sum(item.num_bytes for item, _, _ in self._held)
        if self._held and (key_of(self._held[0][1]) != key_of(path) or held > HELD_BYTES):
            yield from self._release()
        self._held.append((item, path, archive))
        if not self._wanted:
            yield from self._release()

    def _release(self) -> Iterator[Item]:
        held, self._held = self._held, []
        if self._wanted:
            self._stems_taken.update(posixpath.splitext(path)[0] for _, path, _ in held)
        for item, path, archive in held:
            if self._wanted and gives_way(path, self._stems_taken, self._wanted):
                self._tally.ignored["other picture"] += 1
                continue
            self.samples.pictures.append(Picture(self._number, path, archive))
            self._number += 1
            yield item

    def _link(self, member: tarfile.TarInfo, path: str, archive: int) -> Iterator[Item]:
        """Ignores a link to a member of the archive; an image linked from elsewhere is missing."""
        folder = "" if member.islnk() else posixpath.dirname(path)
        target = _path_of(posixpath.join(folder, member.linkname))
        label = self._labels.get(target)
        if suffix_of(path) in LABEL_SUFFIXES and label is not None:
            self.samples.labels.append(LabelFile(path, archive, label.label, label.problem))
        elif suffix_of(path) in suffixes("image") and target not in self._paths:
            detail = f"a link to {member.linkname!r}, which is not in this archive"
            self._number += 1
            yield Item(self._address(member.name), problem=("unreadable", detail))
        else:
            self._tally.ignored["link"] += 1


class _Refused(Exception):
    """A member that is not read.

    Attributes:
        problem: reason and detail.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(*problem)
        self.problem = problem
