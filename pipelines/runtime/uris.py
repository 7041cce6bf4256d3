"""Runs live at a URI, local or `s3://`: how the trainer's files get there and back.

Everything goes through fsspec, which takes S3 credentials and endpoint from the environment; Ray
wants the same file system in pyarrow's clothes.
"""

from __future__ import annotations

import contextlib
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs


def open_uri(uri: str) -> tuple[Any, str]:
    """Returns (fsspec file system, path in it); nothing about the remote side is cached."""
    fs, path = split_uri(uri, use_listings_cache=False)
    return fs, path.rstrip("/")


def split_uri(uri: str, **options: Any) -> tuple[Any, str]:
    """Returns (fsspec file system, path in it); `::` in a path without protocol is part of a name.

    Args:
        uri: a local path or an address.
        options: of the file system.
    """
    if "::" in uri and "://" not in uri:
        fs = fsspec.filesystem("file", **options)
        return fs, str(fs._strip_protocol(uri))
    fs, path = fsspec.core.url_to_fs(uri, **options)
    return fs, str(path)


PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
"""PyPI packages that bring fsspec a file system, by protocol, where the two names differ."""
READABLE = "Places are local paths, file:// or s3:// (S3 and what speaks its protocol)."


def check_protocol(uri: str, about: str = "") -> None:
    """Refuses a URI whose protocol no installed file system understands.

    Args:
        uri: A local path or an address.
        about: What the message begins with, as in `--data.train: `.

    Raises:
        ValueError: Says which package is missing, or which protocols there are.
    """
    protocol, separator, _ = uri.partition("://")
    if not separator or "::" in uri:
        return
    about = f"{about}{uri}: "
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = PACKAGES.get(protocol, f"fsspec's package for {protocol}")
        way_out = f"to read {protocol}://, pip install {package}"
        raise ValueError(f"{about}{way_out}\n{READABLE}") from error
    except ValueError as error:
        hint = f"; write {protocol.lower()}://" if protocol.lower() in ("s3", "file") else ""
        raise ValueError(f"{about}nothing here reads {protocol}://{hint}\n{READABLE}") from error


def public_name(uri: str) -> str:
    """Returns an address without user, password and query, any of which may be secret."""
    if "://" not in uri:
        return uri
    parts = urllib.parse.urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def is_local(fs: Any) -> bool:
    """Whether a file system's paths are paths of this machine."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def absolute_uri(uri: str) -> str:
    """Makes a local path absolute (tasks and workers run in other directories).

    `~` and `file://` are understood. Links stay as they are named: other machines may have them lead
    elsewhere.
    """
    if not uri:
        return uri
    fs, path = open_uri(uri)
    if not is_local(fs):
        return uri.rstrip("/")
    if ".." in Path(path).parts:  # what is above a link is above what it leads to
        return str(Path(path).resolve())
    return str(Path(path))


def join_uri(uri: str, *names: str) -> str:
    """Appends path components to a URI."""
    return "/".join([uri.rstrip("/"), *names])


def ray_storage(uri: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """Returns what Ray's `storage_path` and `storage_filesystem` want for a URI."""
    fs, path = open_uri(uri)
    if is_local(fs):
        return str(Path(path).resolve()), None
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


@contextlib.contextmanager
def local_copy(uri: str, pattern: str = "*") -> Iterator[Path]:
    """Yields a local folder with the files of a folder URI that match `pattern`.

    Local folders are yielded as they are; remote ones are downloaded and removed afterwards.
    """
    fs, path = open_uri(uri)
    if is_local(fs):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="rayjepa-") as folder:
        for remote in fs.glob(f"{path}/{pattern}"):
            fs.get_file(remote, str(Path(folder) / Path(remote).name))
        yield Path(folder)
