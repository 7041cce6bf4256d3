"""Addresses of raw data, and which of them are read."""

from __future__ import annotations

from typing import Any

import fsspec

from pipelines.runtime.uris import split_uri

_STREAMS = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "rtp")


def file_system(address: str) -> tuple[Any, str]:
    """Returns the file system of an address, and the path there.

    Raises:
        ValueError: its protocol is none that is read here.
    """
    check_address(address)
    protocol, found, _ = address.partition("://")
    if found and "::" not in address:
        _check_protocol(protocol, address)
    return split_uri(address)


def protocol_of(fs: Any) -> str:
    """Returns fsspec's first name of a file system."""
    return str(fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0])


def check_address(address: str) -> None:
    """Refuses what is no place of files: whether something is there need not be asked.

    Raises:
        ValueError: a live stream, or an address of the web.
    """
    protocol, found, _ = address.partition("://")
    if not found or "::" in address:
        return
    if protocol.lower() in _STREAMS:
        raise ValueError(f"--source: {address} is a live stream: add --follow")
    if protocol.lower() in ("http", "https"):
        raise ValueError(
            f"--source: {address} is a web address; download it and give the folder or file, "
            "or add --follow if it is a live stream"
        )


def _check_protocol(protocol: str, address: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        way_out = "write s3:// in lower case" if protocol.lower() == "s3" else "copy it there"
        message = f"{protocol}:// is not read ({address}), only local paths and s3:// are"
        raise ValueError(f"--source: {message}: {way_out}") from error
