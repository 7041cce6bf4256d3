"""One way to handle the URIs of local and remote files: open, join, make absolute, write, copy.

A URI is a local path, `file://...`, `s3://bucket/prefix` or whatever else fsspec has a file system
for. Credentials and endpoint of S3 come from the environment. Code that opens a file by URI goes
through this module, so that local and remote storage behave alike.
"""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

from models.file_systems import file_system, url_to_fs
from models.scratch import scratch


def public_name(uri: str) -> str:
    """Returns an address without user, password and query, any of which may be secret."""
    if "://" not in uri:
        return uri
    parts = urllib.parse.urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def open_uri(uri: str | Path, *, patience_s: float | None = None) -> tuple[Any, str]:
    """Finds the file system of a URI.

    A `::` in a local path is part of a name; fsspec would take it for chained file systems.

    Args:
        uri: A local path or an address.
        patience_s: As in `models.file_systems.url_to_fs`.

    Returns:
        The fsspec file system, which does not cache remote listings, and the path in it without a
        slash at the end.
    """
    uri = str(uri)
    if "::" in uri and "://" not in uri:
        fs: Any = file_system("file")
        path = str(fs._strip_protocol(uri))
    else:
        fs, path = url_to_fs(uri, patience_s=patience_s)
    return fs, path.rstrip("/") or path


def protocol_of(fs: Any) -> str:
    """Returns the first of fsspec's names of a file system's protocol, such as `file` or `s3`."""
    return str(fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0])


def is_local(fs: Any) -> bool:
    """Whether the paths of a file system are paths of this machine."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def is_s3(fs: Any) -> bool:
    """Whether a file system is S3, or what speaks its protocol."""
    return "s3" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def uri_of(fs: Any, path: str) -> str:
    """Returns the URI of a path in a file system, as messages name it; a local path itself."""
    return path if is_local(fs) else f"{protocol_of(fs)}://{path.lstrip('/')}"


def open_exact(fs: Any, path: str) -> Any:
    """Opens a file that is read in places, such as Parquet: no byte is fetched that nobody asks.

    A remote file otherwise reads 50 MiB ahead.
    """
    return fs.open(path, "rb") if is_local(fs) else fs.open(path, "rb", cache_type="none")


def absolute_uri(uri: str) -> str:
    """Makes a local path absolute, because tasks and workers run in other directories.

    `~` and `file://` are resolved. Symbolic links are kept, because they may lead elsewhere on
    other machines; only a path with `..` in it is resolved, as the folder above a link's target is
    meant.
    """
    if not uri:
        return uri
    fs, path = open_uri(uri)
    if not is_local(fs):
        return uri.rstrip("/")
    if ".." in Path(path).parts:
        return str(Path(path).resolve())
    return str(Path(path))


def join_uri(uri: str, *names: str) -> str:
    """Appends path components to a URI."""
    return "/".join([uri.rstrip("/"), *names])


def ray_storage(uri: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """Returns the `storage_path` and `storage_filesystem` of Ray's `RunConfig` for a URI.

    Remote file systems are fsspec's, wrapped for pyarrow.
    """
    fs, path = open_uri(uri)
    if is_local(fs):
        return str(Path(path).resolve()), None
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


def write_atomic(fs: Any, path: str, data: bytes) -> None:
    """Writes a whole file so that readers see either the old file or the new one, never a part.

    Folders above it are created. A local file is synced to disk before it gets its name.
    """
    if not is_local(fs):
        fs.pipe_file(path, data)  # an object appears when its upload completes
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


def abort_uploads(uri: str) -> None:
    """Ends uploads below a URI that nobody will finish; S3 keeps and bills their parts.

    Only for a place where nobody else writes at the moment. A storage that knows no such uploads,
    or lets nobody ask for them, is let be: a lifecycle rule of the bucket removes them too.
    """
    fs, path = open_uri(uri)
    if is_s3(fs):
        with contextlib.suppress(OSError):
            fs.abort_uploads(path)


@contextlib.contextmanager
def local_file(fs: Any, path: str) -> Iterator[str]:
    """Yields the local path of one file; a remote file is downloaded and removed afterwards.

    Raises:
        OSError: The file cannot be read.
    """
    if is_local(fs):
        with Path(path).open("rb"):
            pass  # raises where it cannot be read
        yield path
        return
    with scratch("file") as folder:
        copy = f"{folder}/copy"
        fs.get_file(path, copy)
        yield copy


@contextlib.contextmanager
def local_copy(uri: str, *patterns: str) -> Iterator[Path]:
    """Yields a local folder with the files of a folder URI that match one of `patterns`.

    A local folder is yielded itself; remote files are downloaded and removed afterwards.
    """
    fs, path = open_uri(uri)
    if is_local(fs):
        yield Path(path)
        return
    with scratch("copy") as folder:
        for remote in [found for pattern in patterns for found in fs.glob(f"{path}/{pattern}")]:
            fs.get_file(remote, str(folder / Path(remote).name))
        yield folder
