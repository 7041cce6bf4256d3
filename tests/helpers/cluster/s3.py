"""S3 for the rig: moto's server, and before it a proxy that misbehaves when told to."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec

from helpers.cluster.network import LAPTOP
from helpers.s3_proxy import S3Proxy
from helpers.serve.free_ports import free_ports

BUCKET = "rig"
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
START_S = 60


@dataclasses.dataclass
class RigS3:
    """An S3 with one bucket. The hosts reach it through `proxy`, the test past it."""

    server: subprocess.Popen[bytes]
    proxy: S3Proxy
    endpoint: str
    """Of the server itself."""

    @classmethod
    def start(cls, rig: Path) -> RigS3:
        (port,) = free_ports(1)
        moto = str(Path(sys.executable).with_name("moto_server"))
        with (rig / "s3.log").open("wb") as log:
            server = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", moto, "-p", str(port)], stdout=log, stderr=log
            )
        _wait_for(port)
        endpoint = f"http://127.0.0.1:{port}"
        s3 = cls(server, S3Proxy(endpoint, LAPTOP), endpoint)
        s3.files().mkdir(BUCKET)
        return s3

    @property
    def env(self) -> dict[str, str]:
        """Environment that leads to it through the proxy."""
        return KEYS | {"AWS_ENDPOINT_URL": self.proxy.url}

    def files(self) -> Any:
        """A file system past the proxy; nothing is cached."""
        return fsspec.filesystem(
            "s3",
            key=KEYS["AWS_ACCESS_KEY_ID"],
            secret=KEYS["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.endpoint,
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def lines(self, pattern: str) -> list[dict[str, Any]]:
        """Returns the JSON lines of all files `BUCKET/pattern`, those cut by a kill left out."""
        files, found = self.files(), []
        for path in sorted(files.glob(f"{BUCKET}/{pattern}")):
            text = files.cat_file(path).decode()
            found += [json.loads(line) for line in text.splitlines(keepends=True) if "\n" in line]
        return found

    def stop(self) -> None:
        self.proxy.close()
        self.server.kill()
        self.server.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("moto_server did not start")
