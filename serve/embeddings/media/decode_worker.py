"""Decoder processes: each video is decoded in a fork of a process that has imported everything.

A decoder written in C that is fed with anything from the internet may loop, crash, or take all
memory. So every video gets a process of its own with hard limits, which the replica can kill at the
deadline without losing anything else. A fork is ready in milliseconds; the imports of a new process
take seconds.

    python -m serve.embeddings.media.decode_worker MEMORY_BYTES    (standard input is a Unix socket)

With each byte on that socket comes one end of a socket pair. A fork of this process works on it,
and the answer is its process id. A message on the pair consists of the lengths of a JSON head and
of a payload (two big-endian 32-bit numbers), the head and the payload. There is no pickle in it, so
that whoever takes over a decoder has not taken over the replica.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import resource
import signal
import socket
import struct
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, get_args

import av
import av.logging
import numpy as np

from models.media.fit import Fit
from models.media.preprocessing import Preprocessing, eval_transform
from models.media.video.containers import VideoError
from serve.embeddings.media.live_video import decode_stream
from serve.embeddings.media.sample_video import ClipRequest, sample_video, upright

LENGTHS = struct.Struct(">II")
GRACE_S = 2.0
"""Seconds after the deadline that the replica has to kill this process before it ends by itself."""


class Channel:
    """One end of a socket pair, blocking."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, head: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        """Sends one message."""
        text = json.dumps(head, allow_nan=False).encode()
        self._connection.sendall(LENGTHS.pack(len(text), len(payload)) + text)
        self._connection.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Receives one message.

        Raises:
            EOFError: the replica has closed its end.
        """
        text_length, payload_length = LENGTHS.unpack(self._exactly(LENGTHS.size))
        head: dict[str, Any] = json.loads(self._exactly(text_length))
        return head, self._exactly(payload_length)

    def _exactly(self, length: int) -> bytes:
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            count = self._connection.recv_into(view[done:])
            if not count:
                raise EOFError("the replica closed the channel")
            done += count
        return bytes(data)


def restrict(memory_bytes: int) -> None:
    """Gives up everything that a decoder does not need.

    Address space is limited to what the imports have mapped plus `memory_bytes`. No descriptors
    beyond the first three are allowed, so the process cannot open a file or a connection.
    """
    with contextlib.suppress(OSError):  # if memory runs out all the same, kill this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(kind, (value, value))


def set_deadline(seconds: float, running: bool = True) -> None:
    """Ends this process after some time, whatever it does then (the default action of SIGALRM).

    Args:
        seconds: time from now on.
        running: False takes the deadline back.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_S if running else 0)


def work(channel: Channel) -> None:
    """Does the one job that is sent through the channel."""
    head, payload = channel.receive()
    set_deadline(head["timeout_s"])
    prep = Preprocessing(**head["prep"])
    try:
        if head["kind"] == "stream":
            clock = partial(set_deadline, head["timeout_s"])
            decode_stream(channel, prep, clock=clock, **head["job"])
            channel.send({"ended": True})
            return
        found = sample_video(payload, ClipRequest(**head["job"]), prep)
        reply = {"times_s": found.times_s, "duration_s": found.duration_s, "picture": found.size}
        channel.send(reply, found.pixels_THWC.data.cast("B"))
    except VideoError as error:
        channel.send({"reason": error.reason, "detail": error.detail})
    except MemoryError:
        channel.send({"reason": "too_much_memory", "detail": "decoding needs more than is allowed"})
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        # A hostile file can make any value absurd; all of that is the file's fault.
        detail = f"{type(error).__name__}: {error}"
        channel.send({"reason": "decode_error", "detail": detail})


def import_everything() -> None:
    """Imports what PyAV, Pillow and NumPy import on first use; workers cannot open files."""
    image = upright(np.zeros((3, 5, 3), np.uint8), 1, Fraction(2))
    for fit in get_args(Fit):
        stats: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        eval_transform(image, Preprocessing(image_size=2, patch_size=1, fit=fit, **stats))
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _become_worker(descriptor: int, memory_bytes: int) -> None:
    os.dup2(descriptor, 0)
    os.closerange(3, descriptor + 16)
    restrict(memory_bytes)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionError):
        work(Channel(socket.socket(fileno=0)))


def main() -> None:
    """Forks a worker for every socket that comes, until the replica has ended."""
    memory_bytes = int(sys.argv[1])
    import_everything()
    av.logging.set_level(None)  # or a hostile file could fill the log
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps our children
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the replica, which decides
    control = socket.socket(fileno=os.dup(0))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        child = os.fork()
        if not child:
            try:
                _become_worker(descriptors[0], memory_bytes)
            finally:
                os._exit(0)
        os.close(descriptors[0])
        control.sendall(child.to_bytes(4))


if __name__ == "__main__":
    main()
