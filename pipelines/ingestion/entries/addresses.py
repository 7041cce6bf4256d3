"""Which addresses are sources of files, and which need another command or flag."""

from __future__ import annotations

from typing import Any

from models.file_systems import check_protocol
from pipelines.runtime.uris import open_uri

_STREAMS = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "rtp")


def open_address(address: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a source or of a listed file, and the path in it.

    Raises:
        ValueError: The address is a live stream or a web page, or nothing here reads its protocol.
    """
    check_address(address)
    check_protocol(address, "--source: ")
    return open_uri(address)


def check_address(address: str) -> None:
    """Refuses live streams and web pages, without asking whether anything is there.

    Raises:
        ValueError: Names the way out.
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
