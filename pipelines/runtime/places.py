"""Checks the places that a configuration names before work begins: they must exist or be writable.

An error names the flag, before Ray is started or an image is read. While the work goes on, S3 is
asked whether it answers: those who wait for it are workers, whose lines nobody sees.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from models.file_systems import S3, check_protocol
from pipelines.config.places import Place, places, with_places
from pipelines.runtime.uris import absolute_uri, is_local, is_s3, open_uri

C = TypeVar("C")


def prepare(config: C, *, write: bool = True) -> C:
    """Makes every place of a configuration absolute and checks each.

    Args:
        config: Any configuration, or a part of one.
        write: Also tries to write where the job will.

    Returns:
        `config` for tasks and workers, which run in other folders and on other machines.

    Raises:
        ValueError: a protocol that nothing here reads; a place to read that is not there. Names
            flag and value.
        OSError: a place cannot be read or written.
    """
    config = absolute(config)
    for place in places(config):
        with about(place):
            _require_answer(place)
            if place.field.written:
                if write:
                    try_writing(place)
            elif place.field.required and not place.field.or_name:
                _require_there(place)
    return config


@contextlib.contextmanager
def about(place: Place) -> Iterator[None]:
    """Adds the flag and value of a place as a note to whatever is raised inside."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{place.flag}: {place.uri}")
        raise


def absolute(config: C) -> C:
    """Makes every place of a configuration absolute.

    Raises:
        ValueError: a protocol that nothing here reads.
    """
    return with_places(config, _absolute)


def _absolute(place: Place) -> str:
    """Raises ValueError unless it is named, and the protocol is one that can be read here."""
    if not place.uri:
        raise ValueError(
            f"{place.flag}: it is empty, and not taken for the folder you are in: name it"
        )
    if place.field.or_name:
        return place.uri
    check_protocol(place.uri, f"{place.flag}: ")
    with about(place):
        return absolute_uri(place.uri)


def _require_answer(place: Place) -> None:
    """Asks S3 with little patience: an endpoint that is wrong from the start says so soon.

    Raises:
        Exception: There is no answer; that of another kind is for whoever needs the place.
    """
    if not place.uri.startswith(tuple(f"{protocol}://" for protocol in S3)):
        return
    from models.s3_errors import passes

    fs, path = open_uri(place.uri, patience_s=FIRST_ANSWER_S)
    try:
        fs.exists(path)
    except Exception as error:
        if passes(error):
            raise


FIRST_ANSWER_S = 3.0
"""Patience with S3 when a command begins; one request may go wrong."""
MAKE = "Make it, or name another."


def _require_there(place: Place) -> None:
    fs, path = open_uri(place.uri)
    pattern = re.search(r"[*?[]", path)
    if (
        pattern or "http" in fs.protocol or fs.exists(path)
    ):  # whoever reads these checks them better
        return
    bucket = missing_bucket(fs, path)
    if bucket:
        raise ValueError(f"{place.flag}: {place.uri}: there is no bucket {bucket}\n{MAKE}")
    raise ValueError(f"{place.flag}: {place.uri} does not exist")


def missing_bucket(fs: Any, path: str) -> str | None:
    """Returns the bucket of a path on S3 if it does not exist; else None."""
    if not is_s3(fs):
        return None
    bucket: str = fs.split_path(path)[0]
    return None if fs.exists(bucket) else bucket


def try_writing(place: Place) -> None:
    """Writes a small file where a job will write, and removes it.

    For a local folder that does not exist yet, the nearest existing folder above it is tried.

    Raises:
        OSError: The place cannot be written.
    """
    fs, path = open_uri(place.uri)
    name = f".rayjepa-{uuid.uuid4().hex[:12]}"
    if not is_local(fs):
        path = path.rpartition("/")[0] if place.field.file else path
        fs.pipe_file(f"{path}/{name}", b"x")
        with contextlib.suppress(PermissionError):  # some may write and not remove
            fs.rm_file(f"{path}/{name}")
        return
    if place.field.file and Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    folder = Path(path).parent if place.field.file else Path(path)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    trial = folder / name
    try:
        trial.write_bytes(b"x")
    except FileNotFoundError as error:  # as /proc says it: the folder is there
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder)) from error
    finally:
        trial.unlink(missing_ok=True)


def holding(found: Sequence[Place], text: str) -> Place | None:
    """Returns the place that a path, an address or a message mentions; the longest if several."""
    inside = [place for place in found if _names(text, place.uri.rstrip("/"))]
    return max(inside, key=lambda place: len(place.uri), default=None)


def _names(text: str, uri: str) -> bool:
    if "/" not in uri:  # a bare word may be in the text by chance
        return text == uri or text.startswith(f"{uri}:")
    return re.search(rf"(?<![\w./-]){re.escape(uri)}(?![\w-])", text) is not None


ASK_EVERY_S = 5.0


@contextlib.contextmanager
def watched(found: Sequence[Place]) -> Iterator[None]:
    """Asks S3 every few seconds whether it answers, for the length of the block.

    `models.s3_waiting` writes the line, once an outage, whoever of this process asked.

    Args:
        found: The places of the job; one of each bucket is asked for.
    """
    uris = {place.uri.split("/")[2]: place.uri for place in found if _on_s3(place)}
    done = threading.Event()
    if uris:
        ask = threading.Thread(target=_ask, args=(sorted(uris.values()), done), daemon=True)
        ask.start()
    try:
        yield
    finally:
        done.set()  # not joined: an answer may take its time


def _on_s3(place: Place) -> bool:
    return place.uri.partition("://")[0] in S3 and place.uri.count("/") > 1


def _ask(uris: Sequence[str], done: threading.Event) -> None:
    while not done.wait(ASK_EVERY_S):
        for uri in uris:
            with contextlib.suppress(Exception):  # noted where it failed, and told by the job
                fs, path = open_uri(uri, patience_s=0)
                fs.exists(path)
