"""Tells failures of one file from failures of the storage as a whole."""

from __future__ import annotations

import errno
import lzma
import tarfile
import zlib

import pyarrow as pa

from models.s3_errors import refuses_all

# What a damaged archive, or an object that the storage refuses, may raise.
DAMAGE = (
    *(OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, pa.ArrowException),
    UnicodeDecodeError,  # of a Parquet file's column names
)
_PASSING = (
    *(errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENETUNREACH),
    getattr(errno, "EREMOTEIO", errno.EBUSY),  # s3fs's number for S3's 500; macOS has none
)


def raise_if_unreachable(error: BaseException) -> None:
    """Raises an error that is not about one object, as quarantining that object would lose data."""
    if not isinstance(error, DAMAGE) or isinstance(error, ConnectionError | TimeoutError):
        raise error
    if getattr(error, "errno", None) in _PASSING or refuses_all(error):
        raise error


def problem_of(error: BaseException, otherwise: str = "unreadable") -> tuple[str, str]:
    """Returns (reason, detail): `unreadable` for what the storage refused, else `otherwise`.

    Raises:
        BaseException: `error` itself, where it is not about one object.
    """
    raise_if_unreachable(error)
    if isinstance(error, OSError) and error.strerror:
        return "unreadable", f"{type(error).__name__}: {error.strerror}"
    return otherwise, f"{type(error).__name__}: {error}"


def too_many_bytes(size: int, limit: int) -> tuple[str, str]:
    """Returns the problem of an object of `size` bytes where `limit` are allowed."""
    return "too_many_bytes", f"{size} is over the limit of {limit} bytes"
