"""A small file that is only changed by whoever has seen its newest version."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from models.s3_errors import NOT_IMPLEMENTED, status_of
from pipelines.runtime.uris import is_local, is_s3, open_uri, write_atomic

MOST_BYTES = 100_000
"""With a range, s3fs asks once and not twice."""


class TakenError(RuntimeError):
    """Somebody else has made or changed the file in the meantime."""


class LeaseFile(Protocol):
    """What a lease needs of a storage. A version is any text that changes with the contents."""

    def read(self) -> tuple[bytes, str] | None:
        """Returns contents and version; None if there is no file."""

    def create(self, data: bytes) -> str:
        """Makes the file and returns its version; raises TakenError if it exists."""

    def replace(self, data: bytes, version: str) -> str:
        """Changes the file and returns the new version; raises TakenError if it has another."""

    def remove(self) -> None:
        """Removes the file."""

    def age_s(self) -> float | None:
        """Seconds since the last change, by the storage's own clock; None if there is no file."""

    def without_patience(self) -> LeaseFile:
        """Returns the same file, with which the first failure of the storage is raised."""


def lease_file(uri: str, *, patience_s: float | None = None) -> LeaseFile:
    """Returns the file at a URI, as its storage allows: on S3 with conditional requests."""
    fs, path = open_uri(uri, patience_s=patience_s)
    if is_local(fs):
        return LocalLeaseFile(Path(path))
    return S3LeaseFile(fs, path, uri) if is_s3(fs) else PlainLeaseFile(fs, path)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class LocalLeaseFile:
    """On a disk, or a network file system: under a lock on the folder.

    The lock of a process that dies is gone with it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl

        self._path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems lock no folders
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def read(self) -> tuple[bytes, str] | None:
        """See `LeaseFile`."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        return data, _version(data)

    def create(self, data: bytes) -> str:
        """See `LeaseFile`."""
        return self._write(data, None)

    def replace(self, data: bytes, version: str) -> str:
        """See `LeaseFile`."""
        return self._write(data, version)

    def _write(self, data: bytes, version: str | None) -> str:
        with self._locked():
            found = self.read()
            if (found[1] if found else None) != version:
                raise TakenError
            write_atomic(open_uri(self._path)[0], str(self._path), data)
        return _version(data)

    def remove(self) -> None:
        """See `LeaseFile`."""
        self._path.unlink(missing_ok=True)

    def age_s(self) -> float | None:
        """See `LeaseFile`; a file that is made now tells the file system's time."""
        now = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:8]}")
        now.touch()
        try:
            return now.stat().st_mtime - self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            now.unlink()

    def without_patience(self) -> LeaseFile:
        """See `LeaseFile`."""
        return self


class S3LeaseFile:
    """On S3, by requests that S3 refuses (412) unless the version is the one that was seen.

    Some servers pass over the condition. There the one whose file was overwritten notices it when
    it changes the file next.
    """

    def __init__(self, fs: Any, path: str, uri: str) -> None:
        self._fs, self._uri = fs, uri
        bucket, key, _ = fs.split_path(path)
        self._at = {"Bucket": bucket, "Key": key}

    def read(self) -> tuple[bytes, str] | None:
        """See `LeaseFile`."""
        try:
            head = self._fs.call_s3("head_object", **self._at)
            path = f"{self._at['Bucket']}/{self._at['Key']}"
            data = self._fs.cat_file(path, start=0, end=MOST_BYTES)
        except FileNotFoundError:
            return None
        return data, str(head["ETag"])

    def create(self, data: bytes) -> str:
        """See `LeaseFile`."""
        return self._put(data, IfNoneMatch="*")

    def replace(self, data: bytes, version: str) -> str:
        """See `LeaseFile`."""
        try:
            now = str(self._fs.call_s3("head_object", **self._at)["ETag"])
        except FileNotFoundError as error:
            raise TakenError from error
        if now != version:
            raise TakenError
        return self._put(data, IfMatch=version)

    def _put(self, data: bytes, **condition: str) -> str:
        try:
            return str(self._fs.call_s3("put_object", **self._at, Body=data, **condition)["ETag"])
        except FileNotFoundError as error:  # to be replaced, and gone
            raise TakenError from error
        except OSError as error:
            if status_of(error) in (409, 412):
                raise TakenError from error
            if status_of(error) == NOT_IMPLEMENTED and condition:  # some servers know no conditions
                return self._put(data)
            raise

    def remove(self) -> None:
        """See `LeaseFile`."""
        self._fs.call_s3("delete_object", **self._at)

    def age_s(self) -> float | None:
        """See `LeaseFile`."""
        try:
            head = self._fs.call_s3("head_object", **self._at)
        except FileNotFoundError:
            return None
        now = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        then = head["LastModified"]
        served = email.utils.parsedate_to_datetime(now).timestamp() if now else time.time()
        return served - float(then.timestamp())

    def without_patience(self) -> LeaseFile:
        """See `LeaseFile`."""
        return lease_file(self._uri, patience_s=0)


class PlainLeaseFile:
    """On a storage without conditions: the last writer wins, and the other one notices."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path

    def read(self) -> tuple[bytes, str] | None:
        """See `LeaseFile`."""
        try:
            data = self._fs.cat_file(self._path)
        except FileNotFoundError:
            return None
        return data, _version(data)

    def create(self, data: bytes) -> str:
        """See `LeaseFile`; Google's storage and Azure's let one of several make it."""
        if self._fs.exists(self._path):  # not every file system knows the mode
            raise TakenError
        try:
            self._fs.pipe_file(self._path, data, mode="create")
        except FileExistsError as error:
            raise TakenError from error
        return _version(data)

    def replace(self, data: bytes, version: str) -> str:
        """See `LeaseFile`."""
        found = self.read()
        if found is None or found[1] != version:
            raise TakenError
        self._fs.pipe_file(self._path, data)
        return _version(data)

    def remove(self) -> None:
        """See `LeaseFile`."""
        self._fs.rm_file(self._path)

    def age_s(self) -> float | None:
        """See `LeaseFile`: unknown to this one, whose clock may be wrong; so it watches."""
        from pipelines.runs.lease import STALE_BEATS, beat_s

        before = self.read()
        for _ in range(STALE_BEATS + 1):
            time.sleep(beat_s())
            if self.read() != before:
                return 0.0
        return None

    def without_patience(self) -> LeaseFile:
        """See `LeaseFile`."""
        return self
