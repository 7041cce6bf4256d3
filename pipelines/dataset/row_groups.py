"""Reads row groups of shards: from object storage no more than the bytes of the columns asked for.

A file system's own read-ahead would fetch blocks of 50 MiB, many times what a row group holds.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.runtime.uris import is_local, uri_of

MAGIC = b"PAR1"
TAIL_BYTES = 8
"""What a Parquet file ends with: the footer's length in 4 bytes, and `MAGIC`."""
MARGIN = 1.05
"""A footer is first asked for with the length of the one read before in the same folder, times
this: shards of a set have about as many row groups, and one request is then enough."""
_footer_bytes: dict[str, int] = {}
"""Length of the footer that was last read, by folder."""


def read_row_group(
    fs: Any, root: str, file: str, index: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads one row group of one shard; footers are remembered (shards never change).

    Args:
        fs: file system, from `open_uri`.
        root: folder in it, from `open_uri`.
        file: `Shard.file`.
        index: row group in the file.
        columns: columns to read; None for all.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: the shard is damaged; names its URI.
    """
    path = f"{root}/{file}"
    try:
        footer = _footer(fs, path)
        with _open(fs, path, footer) as handle:
            parquet = pq.ParquetFile(handle, metadata=footer, pre_buffer=True)
            return parquet.read_row_group(index, columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        if not _tells_damage(error):
            raise
        raise ValueError(
            f"{uri_of(fs, path)}: the shard is damaged ({str(error).splitlines()[0]}).\n"
            "Ingest again into a new folder, or copy the shard from where it is whole."
        ) from error


def _tells_damage(error: Exception) -> bool:
    """Whether Arrow could not read what it got; for pages it then raises a bare OSError."""
    bare = type(error) is OSError and error.errno is None
    return bare or isinstance(error, pa.ArrowInvalid)


def read_footer(fs: Any, path: str) -> Any:
    """Reads the metadata of a Parquet file, and from object storage nothing else.

    Raises:
        FileNotFoundError: there is no such file.
        pyarrow.ArrowInvalid: it is not a Parquet file, or cut.
    """
    if is_local(fs):
        return pq.read_metadata(path)
    folder = path.rpartition("/")[0]
    tail = fs.cat_file(path, start=-_footer_bytes.get(folder, TAIL_BYTES))
    length = int.from_bytes(tail[-TAIL_BYTES:-4], "little") + TAIL_BYTES
    if tail[-4:] != MAGIC:
        raise pa.ArrowInvalid("it does not end as a Parquet file")
    if length > len(tail):
        tail = fs.cat_file(path, start=-length)
    _footer_bytes[folder] = int(length * MARGIN)
    return pq.read_metadata(pa.BufferReader(tail))


_footer = functools.lru_cache(maxsize=256)(read_footer)


def _open(fs: Any, path: str, footer: Any) -> Any:
    return fs.open(path, "rb") if is_local(fs) else _Ranges(fs, path, _end_of_data(footer))


def _end_of_data(footer: Any) -> int:
    """Where the last column of the last row group ends."""
    if not footer.num_row_groups:
        return 0
    group = footer.row_group(footer.num_row_groups - 1)
    column = group.column(group.num_columns - 1)
    starts = (column.dictionary_page_offset, column.data_page_offset)
    start: int = min(offset for offset in starts if offset is not None)
    return start + int(column.total_compressed_size)


class _Ranges(io.RawIOBase):
    """A remote file of which every read is one request for just these bytes.

    Its size is given, so that no request asks for it. Arrow joins reads that lie close together
    (`pre_buffer`).
    """

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self._size, self._place = fs, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = origin + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._place + size, self._size)
        if end <= self._place:
            return b""
        data: bytes = self._fs.cat_file(self._path, start=self._place, end=end)
        self._place += len(data)
        return data
