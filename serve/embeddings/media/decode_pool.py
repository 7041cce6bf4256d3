"""Decoder processes as seen by the ingress replica, which starts, feeds, times and kills them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.image_size import height_width
from models.media.preprocessing import EncoderInput, Preprocessing
from serve.embeddings.contract import Decoded
from serve.embeddings.media.fitting import layout_of
from serve.ingress.errors import ApiError

HEAD_BYTES = 65_536
START_TIMEOUT_S = 60.0
_LENGTH_BYTES = 8
# Message of `decoder_died`, a code of the pool; the other codes are the decoder's.
DIED = "the video made the decoder end: it needs more memory than is allowed, or is malformed"


class DecoderGone(Exception):
    """A decoder process ended without a reply."""


@dataclass(frozen=True)
class SampledVideo:
    """Frames of a video, uint8 [T, H, W, 3], with their times and its duration in seconds."""

    frames: Decoded
    times_s: list[float]
    duration_s: float


class Worker:
    """A running decoder process.

    Args:
        pid: its process id.
        reader: reads messages from it.
        writer: writes messages to it.
    """

    def __init__(
        self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = pid
        self._reader, self._writer = reader, writer

    async def send(self, head: dict[str, Any], payload: bytes = b"") -> None:
        """Sends one message.

        Raises:
            DecoderGone: the process has ended.
        """
        text = json.dumps(head).encode()
        try:
            self._writer.write(len(text).to_bytes(4) + len(payload).to_bytes(4) + text)
            self._writer.write(payload)
            await self._writer.drain()
        except ConnectionError as error:
            raise DecoderGone from error

    async def receive(self, max_bytes: int) -> tuple[dict[str, Any], bytes]:
        """Receives one message.

        Raises:
            DecoderGone: the process has ended, or its message is too long or no JSON.
        """
        try:
            lengths = await self._reader.readexactly(_LENGTH_BYTES)
            head_bytes, payload_bytes = int.from_bytes(lengths[:4]), int.from_bytes(lengths[4:])
            if head_bytes > HEAD_BYTES or payload_bytes > max_bytes:
                raise DecoderGone
            head: dict[str, Any] = json.loads(await self._reader.readexactly(head_bytes))
            return head, await self._reader.readexactly(payload_bytes)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise DecoderGone from error

    def end(self) -> None:
        """Kills the process, unless it has ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._writer.close()


class DecodePool:
    """Decodes videos, a few at a time, each in a process of its own.

    Args:
        processes: videos at a time.
        memory_mib: MiB that a process may allocate.
        timeout_s: seconds that a video may take.

    Attributes:
        busy: processes that have a job.
    """

    def __init__(self, *, processes: int, memory_mib: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._memory_bytes = memory_mib * 2**20
        self._places = asyncio.Semaphore(processes)
        self._starting = asyncio.Lock()
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self.busy = 0

    async def sample(
        self, video: bytes, job: dict[str, Any], prep: Preprocessing, *, param: str
    ) -> SampledVideo:
        """Samples frames of a video.

        Args:
            video: the file's bytes.
            job: fields of `serve.embeddings.media.sample_video.ClipRequest`.
            prep: the transform.
            param: the video's path in the request, for errors.

        Raises:
            ApiError: 400 with the reason as its code, `timeout_s` after the decoder's start at the
                latest; or because the regions leave nothing of the frames.
        """
        (height, width), most = height_width(prep.image_size), job["max_frames"]
        async with self._places:
            try:
                async with self.worker("video", prep, job, video) as worker:
                    async with asyncio.timeout(self.timeout_s):
                        head, payload = await worker.receive(most * height * width * 3)
            except TimeoutError as error:
                message = f"decoding took longer than {self.timeout_s:g} s"
                raise ApiError(400, "decode_timeout", message, param=param) from error
            except DecoderGone as error:
                raise ApiError(400, "decoder_died", DIED, param=param) from error
        if "reason" in head:
            raise video_error(head, param)
        frames = as_decoded(head, payload, prep, -1)
        return SampledVideo(frames, head["times_s"], head["duration_s"])

    @asynccontextmanager
    async def worker(
        self, kind: str, prep: Preprocessing, job: dict[str, Any], payload: bytes = b""
    ) -> AsyncIterator[Worker]:
        """Starts a process with a job; it is killed at the end of the block in any case.

        The regions that are left out stay here: they change which patches are encoded, and no
        pixels.
        """
        prep = dataclasses.replace(prep, exclude=())
        worker = await self._start()
        self.busy += 1
        try:
            head = {"kind": kind, "prep": dataclasses.asdict(prep), "job": job}
            async with asyncio.timeout(self.timeout_s):
                await worker.send(head | {"timeout_s": self.timeout_s}, payload)
            yield worker
        finally:
            self.busy -= 1
            worker.end()

    async def warm_up(self) -> None:
        """Starts the template process, from which the others are forked; this takes seconds."""
        (await self._start()).end()

    async def close(self) -> None:
        """Ends the template process; the workers end when their connections close."""
        self._drop_template()

    async def _start(self) -> Worker:
        """Starts a process. If the client leaves meanwhile, the start goes on and the process is
        ended after it, so that impatient clients cannot keep the template from ever starting.
        """
        starting = asyncio.ensure_future(self._start_in_turn())
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_end_unwanted)
            raise

    async def _start_in_turn(self) -> Worker:
        async with self._starting:
            for _ in range(2):  # a template that was killed is replaced once
                try:
                    async with asyncio.timeout(START_TIMEOUT_S):
                        return await self._fork()
                except OSError:  # TimeoutError is one
                    self._drop_template()
        raise ApiError(503, "no_decoder", "the decoder process does not start")

    async def _fork(self) -> Worker:
        if self._control is None:
            self._start_template()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            loop = asyncio.get_running_loop()
            answer = b""
            while len(answer) < 4:
                piece = await loop.sock_recv(self._control, 4 - len(answer))
                if not piece:
                    raise ConnectionResetError("the template process is gone")
                answer += piece
            ours.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            # An answer that is still on its way must not be read as the next one.
            self._drop_template()
            raise
        return Worker(int.from_bytes(answer), reader, writer)

    def _start_template(self) -> None:
        ours, theirs = socket.socketpair()
        # One thread, because a fork has only the thread that called it.
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        paths = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self._template = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "serve.embeddings.media.decode_worker",
                    str(self._memory_bytes),
                ],
                stdin=theirs.fileno(),
                env={**os.environ, **single, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        ours.setblocking(False)
        self._control = ours

    def _drop_template(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._template is not None:
            self._template.kill()
            self._template.wait()
            self._template = None


def _end_unwanted(starting: asyncio.Task[Worker]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().end()


def as_decoded(head: dict[str, Any], payload: bytes, prep: Preprocessing, *frames: int) -> Decoded:
    """Reads a decoder's message as one frame [H, W, 3], or as several [T, H, W, 3].

    Args:
        head: has `picture`, height and width of the frames before the transform, in pixels.
        payload: the pixels.
        prep: the transform, with the regions that are left out.
        frames: T, or -1 for as many as there are; nothing for one frame.

    Raises:
        ApiError: 400, the regions leave nothing of the frames.
    """
    height, width = head["picture"]
    layout = layout_of((height, width), prep)
    pixels = np.frombuffer(payload, np.uint8).reshape(*frames, *layout.size, 3)
    return Decoded(EncoderInput(pixels, layout.kept), (height, width))


def video_error(head: dict[str, Any], param: str | None) -> ApiError:
    """Returns the API error for a decoder's error message."""
    message = f"unusable video: {head['detail']}"
    return ApiError(400, str(head["reason"]), message, param=param)
