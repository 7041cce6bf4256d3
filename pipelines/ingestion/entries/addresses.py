"""Addresses of raw data, and which of them are read."""

from __future__ import annotations

from typing import Any

from pipelines.runtime.uris import check_protocol, split_uri

_STREAMS = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "rtp")


def file_system(address: str) -> tuple[Any, str]:
    """Returns the file system of an address, and the path there.

    Raises:
        ValueError: its protocol is none that is read here.
    """
    check_address(address)
    check_protocol(address, "--source: ")
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
