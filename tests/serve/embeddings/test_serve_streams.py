"""`/v1/streams`: order, times, drops, limits and endings, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from helpers.models.video_files import write_video
from helpers.serve.embeddings import encoded, picture, unit
from helpers.serve.videos import (
    FRAMES,
    PATCHES,
    TUBELET,
    WIDTH,
    LocalServer,
    direct_clip_tokens,
    local_server,
)
from helpers.waiting import wait_until
from models.artifacts.artifact import load_artifact
from models.media.images import decode_image
from models.media.preprocessing import Preprocessing, eval_transform

JPEGS = [encoded(picture(seed), "JPEG") for seed in range(12)]
LIVE = write_video(io.BytesIO(), 24, rate=12, codec="mpeg4", container="mpegts").getvalue()


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[LocalServer]:
    with (
        container_server() as port,
        local_server(
            artifact,
            max_streams=9,
            max_stream_decoders=2,
            stream_idle_s=1.0,
            max_image_bytes=50_000,
            stream_urls=True,
            allow_hosts=(f"private:127.0.0.1:{port}",),
        ) as running,
    ):
        running.source_port = port  # type: ignore[attr-defined]
        yield running


@contextmanager
def container_server() -> Iterator[int]:
    """Sends LIVE in pieces at /live.ts, and for ever bytes of nothing at /noise."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            for first in range(0, len(LIVE), 2_000):
                self.wfile.write(LIVE[first : first + 2_000] if "live" in self.path else b"x" * 999)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http.server_address[1]
    http.shutdown()
    http.server_close()


@contextmanager
def stream(server: LocalServer, **start: Any) -> Iterator[ClientConnection]:
    headers = start.pop("headers", None)
    url = f"ws://127.0.0.1:{server.port}/v1/streams"
    with connect(url, additional_headers=headers, max_size=None) as socket:
        if start.pop("send_start", True):
            socket.send(json.dumps({"type": "start"} | start))
        yield socket


def read(socket: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(timeout=30))
    return message


def read_all(socket: ClientConnection, *, acknowledge: bool = True) -> list[dict[str, Any]]:
    """All messages until the server closes."""
    messages = []
    try:
        while True:
            messages.append(read(socket))
            if acknowledge and messages[-1]["type"] == "embedding":
                ack = {"type": "ack", "index": messages[-1]["index"]}
                socket.send(json.dumps(ack))
    except ConnectionClosed:
        return messages


def end(socket: ClientConnection) -> None:
    socket.send(json.dumps({"type": "end"}))


def pixels_of(jpegs: list[bytes], prep: Preprocessing) -> np.ndarray:
    return np.stack([eval_transform(decode_image(jpeg), prep) for jpeg in jpegs])


# Frames


def test_embeddings_are_those_of_the_windows_in_order_and_with_times(
    server: LocalServer, artifact: Path
) -> None:
    with stream(server, every=2, timestamps=True) as socket:
        for number, jpeg in enumerate(JPEGS[:9]):
            socket.send(struct.pack("<d", 100 + number / 10) + jpeg)
        end(socket)
        started, *embeddings, ended = read_all(socket)
        assert socket.close_code == 1000
    assert started["type"] == "started"
    assert (started["frames"], started["every"]) == (FRAMES, 2)
    # Frames 0-3, then every two, and at the end the window that holds the ninth.
    assert [(m["first_frame"], m["last_frame"]) for m in embeddings] == [
        (0, 3),
        (2, 5),
        (4, 7),
        (5, 8),
    ]
    assert [m["index"] for m in embeddings] == [0, 1, 2, 3]
    assert [m["end_s"] for m in embeddings] == pytest.approx([100.3, 100.5, 100.7, 100.8])
    assert all(0 < m["lag_s"] < 30 for m in embeddings)
    assert (ended["received"], ended["dropped"], ended["rejected"]) == (9, 0, 0)
    pixels = pixels_of(JPEGS, load_artifact(artifact).preprocessing)
    for message in embeddings:
        window = pixels[message["first_frame"] : message["last_frame"] + 1]
        expected = direct_clip_tokens(artifact, window).mean(axis=0)
        np.testing.assert_allclose(message["embedding"], unit(expected), atol=1e-5)
    assert np.abs(np.subtract(embeddings[0]["embedding"], embeddings[1]["embedding"])).max() > 1e-3


def test_pooling_encoding_and_short_streams(server: LocalServer, artifact: Path) -> None:
    """Three frames are a clip of two time steps, the last frame repeated."""
    options = {"pooling": "per_frame", "encoding_format": "base64", "normalize": False}
    with stream(server, **options) as socket:
        for jpeg in JPEGS[:3]:
            socket.send(jpeg)
        end(socket)
        _, message, _ = read_all(socket)
    values = np.frombuffer(base64.b64decode(message["embedding"]), "<f4").reshape(message["shape"])
    pixels = pixels_of([*JPEGS[:3], JPEGS[2]], load_artifact(artifact).preprocessing)
    tokens = direct_clip_tokens(artifact, pixels)
    expected = tokens.reshape(FRAMES // TUBELET, PATCHES, WIDTH).mean(axis=1)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    with stream(server) as socket:
        end(socket)
        assert [m["type"] for m in read_all(socket)] == ["started", "ended"]


def test_a_slow_reader_costs_frames_that_are_counted(server: LocalServer) -> None:
    """It acknowledges nothing for a while: two embeddings, then the queue of four, then drops."""
    with stream(server, every=2, unacknowledged=2, queue=4) as socket:
        for jpeg in JPEGS[:10] * 3:
            socket.send(jpeg)
            time.sleep(0.02)
        messages = [read(socket) for _ in range(3)]  # started and two embeddings
        with pytest.raises(TimeoutError):
            socket.recv(timeout=0.3)
        socket.send(json.dumps({"type": "ack", "index": 1}))
        end(socket)
        *embeddings, ended = messages[1:] + read_all(socket)
    assert ended["received"] == 30
    # Whatever the timing: what was not dropped was embedded or waited, in order.
    assert 10 <= ended["dropped"] <= 24
    assert embeddings[2]["dropped"] > 0
    lasts = [m["last_frame"] for m in embeddings]
    assert lasts == sorted(set(lasts))
    assert lasts[-1] == 29  # the oldest go, the newest stay


def test_many_streams_at_once_share_batches_and_nothing_else(
    server: LocalServer, artifact: Path
) -> None:
    prep = load_artifact(artifact).preprocessing
    pixels = pixels_of(JPEGS, prep)
    server.delay_s, server.batches = 0.05, []
    failures: list[BaseException] = []

    def one(number: int) -> None:
        order = np.roll(np.arange(12), number)
        try:
            with stream(server, every=4, unacknowledged=64) as socket:
                for index in order:
                    socket.send(JPEGS[index])
                end(socket)
                _, *embeddings, ended = read_all(socket)
            assert ended["dropped"] == 0
            assert len(embeddings) == 3
            for message in embeddings:
                window = pixels[order[message["first_frame"] : message["last_frame"] + 1]]
                expected = direct_clip_tokens(artifact, window).mean(axis=0)
                np.testing.assert_allclose(message["embedding"], unit(expected), atol=1e-5)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.delay_s = 0.0
    assert not failures
    assert sum(server.batches) == 24
    assert max(server.batches) > 1  # shared


def test_a_frame_that_does_not_decode_is_counted_and_sixteen_end_the_stream(
    server: LocalServer,
) -> None:
    with stream(server, every=1) as socket:
        for data in (JPEGS[0], b"junk", JPEGS[1], JPEGS[2], JPEGS[3][:200], JPEGS[4]):
            socket.send(data)
        end(socket)
        *_, ended = read_all(socket)
    assert (ended["received"], ended["rejected"]) == (6, 2)
    with stream(server) as socket:
        for _ in range(16):
            socket.send(b"junk")
        *_, error = read_all(socket)
        assert (error["error"]["code"], socket.close_code) == ("not_an_image", 1007)


# Rules and limits


@pytest.mark.parametrize(
    ("messages", "code", "close"),
    [
        ([b"x"], "invalid_message", 1007),
        (["{"], "invalid_json", 1007),
        (['{"type": "begin"}'], "invalid_message", 1007),
        (['{"type": "start", "evry": 2}'], "unknown_field", 1007),
        (['{"type": "start", "every": 0}'], "invalid_message", 1007),
        (['{"type": "start", "fps": -1}'], "invalid_message", 1007),
        (['{"type": "start", "dimensions": 33}'], "invalid_value", 1007),
        (['{"type": "start", "model": "gpt"}'], "model_not_found", 1007),
        (['{"type": "start"}', '{"type": "start"}'], "invalid_message", 1007),
        (['{"type": "start"}', '{"type": "ack", "index": 0}'], "invalid_message", 1007),
        (['{"type": "start", "timestamps": true}', b"1234"], "invalid_message", 1007),
        (['{"type": "start"}', bytes(50_001)], "image_too_large", 1009),
        (['{"type": "start"' + " " * 70_000 + "}"], "message_too_large", 1009),
        (['{"type": "start"}'], "idle", 1008),
        (['{"type": "start", "url": "rtsp://127.0.0.1/x"}'], "invalid_url", 1008),
        (['{"type": "start", "url": "http://127.0.0.1:1/x"}'], "url_not_allowed", 1008),
    ],
)
def test_refusals(server: LocalServer, messages: list[Any], code: str, close: int) -> None:
    with stream(server, send_start=False) as socket:
        for message in messages:
            socket.send(message)
        replies = read_all(socket)
        assert replies[-1]["type"] == "error"
        assert replies[-1]["error"]["code"] == code
        assert (socket.close_code, socket.close_reason) == (close, code)


def test_a_frame_after_the_end_is_refused(server: LocalServer) -> None:
    """The embedding is not acknowledged, so the server lingers and the frame arrives in time."""
    with stream(server) as socket:
        socket.send(JPEGS[0])
        end(socket)
        while read(socket)["type"] != "ended":
            pass
        socket.send(b"x")
        (error,) = read_all(socket)
        assert error["error"]["message"] == "a frame after the end"
        assert (socket.close_code, socket.close_reason) == (1007, "invalid_message")


def test_streams_over_the_limit_are_told_and_places_are_freed(server: LocalServer) -> None:
    hub = server.parts.streams
    assert hub is not None
    wait_until(lambda: hub.streams == 0)
    sockets = []
    for _ in range(9):
        manager = stream(server)
        socket = manager.__enter__()
        assert read(socket)["type"] == "started"
        sockets.append((manager, socket))
    with stream(server, send_start=False) as refused:
        (error,) = read_all(refused)
        assert (error["error"]["code"], refused.close_code) == ("too_many_streams", 1013)
    sockets[0][1].socket.close()  # without a farewell
    for manager, _ in sockets[1:]:
        manager.__exit__(None, None, None)
    wait_until(lambda: hub.streams == 0)
    with stream(server) as socket:
        assert read(socket)["type"] == "started"


def test_leaving_in_the_middle_frees_everything(server: LocalServer) -> None:
    hub = server.parts.streams
    assert hub is not None
    wait_until(lambda: hub.streams == 0)
    server.delay_s = 0.5
    with stream(server, every=1) as socket:
        for jpeg in JPEGS:
            socket.send(jpeg)
        assert read(socket)["type"] == "started"
    server.delay_s = 0.0
    wait_until(lambda: (hub.streams, hub.decoders) == (0, 0))
    tasks = [t.get_name() for t in asyncio.all_tasks(server.loop) if "Stream" in repr(t.get_coro())]
    assert tasks == []


def test_a_slash_at_the_end_of_the_path(server: LocalServer) -> None:
    with connect(f"ws://127.0.0.1:{server.port}/v1/streams/") as socket:
        socket.send('{"type": "start"}')
        assert read(socket)["type"] == "started"


def test_the_key_is_asked_for(artifact: Path) -> None:
    with local_server(artifact, api_key="s3cret", decode_processes=0) as server:
        for headers in (None, {"Authorization": "Bearer wrong"}):
            with stream(server, headers=headers, send_start=False) as socket:
                (error,) = read_all(socket)
                assert (error["error"]["code"], socket.close_code) == ("invalid_api_key", 1008)
        with stream(server, headers={"Authorization": "Bearer s3cret"}) as socket:
            assert read(socket)["type"] == "started"


# Containers


def test_a_container_in_pieces(server: LocalServer) -> None:
    with stream(server, source="container", every=4, fps=6) as socket:
        for first in range(0, len(LIVE), 777):
            socket.send(LIVE[first : first + 777])
        end(socket)
        started, *embeddings, ended = read_all(socket)
        assert socket.close_code == 1000
    assert started["type"] == "started"
    # Two seconds at 12 frames/s, of which half are used.
    assert (ended["received"], ended["skipped"], ended["dropped"]) == (12, 12, 0)
    assert [m["last_frame"] for m in embeddings] == [3, 7, 11]
    assert [m["end_s"] for m in embeddings] == pytest.approx([0.5, 7 / 6, 11 / 6], abs=0.01)
    hub = server.parts.streams
    assert hub is not None
    wait_until(lambda: (hub.decoders, hub.media.decoders.busy) == (0, 0))


def test_bytes_that_are_no_container(server: LocalServer) -> None:
    with stream(server, source="container") as socket:
        socket.send(b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n" + bytes(100_000))
        end(socket)
        *_, error = read_all(socket)
        assert (error["error"]["code"], socket.close_code) == ("not_a_video", 1007)


def test_a_url(server: LocalServer) -> None:
    base = f"http://127.0.0.1:{server.source_port}"  # type: ignore[attr-defined]
    with stream(server, url=f"{base}/live.ts", every=8) as socket:
        _, *embeddings, ended = read_all(socket)
        assert socket.close_code == 1000
    assert ended["received"] == 24
    assert [m["last_frame"] for m in embeddings][:2] == [7, 15]
    with stream(server, url=f"{base}/noise") as socket:
        *_, error = read_all(socket)
        assert error["error"]["code"] == "not_a_video"
