"""Live containers: every frame has its time, and an unreadable end is an error."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.responses import JSONResponse
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from helpers.models.video_files import CYCLE, number_of, write_video
from helpers.repository import ROOT
from helpers.serve.stream_replica import Replica
from helpers.serve.videos import LocalServer, local_server, save_clip_artifact
from models.media.preprocessing import Preprocessing
from models.media.video.containers import VideoError
from serve.embeddings.encoding import encode_values
from serve.embeddings.media.live_video import decode_stream
from serve.ingress.errors import ApiError
from serve.ingress.json_text import to_json
from serve.ingress.websockets import to_text

PREP = Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
FRAMES, RATE = 40, 30
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}
NOISE = np.random.default_rng(0).bytes(60_000)
FORMATS = {
    "mpegts": ("mpegts", {}),
    "matroska": ("matroska", {}),
    "webm": ("webm", {"codec": "libvpx"}),
    "fragmented": ("mp4", {"muxer": FRAGMENTED}),
    "faststart": ("mp4", {"muxer": {"movflags": "faststart"}}),
}


def container(name: str, frames: int = FRAMES, **more: Any) -> bytes:
    kind, options = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:  # faststart reads what it wrote
        path = write_video(Path(folder) / "a", frames, container=kind, **options | more)
        return bytes(path.read_bytes())


def decoded(data: bytes) -> Replica:
    replica = Replica(data)
    decode_stream(replica, PREP, clock=lambda running: None, max_pixels=10**6)
    return replica


def complaint(data: bytes) -> VideoError:
    with pytest.raises(VideoError) as caught:
        decoded(data)
    return caught.value


@pytest.mark.parametrize("name", FORMATS)
def test_every_frame_comes_with_its_time(name: str) -> None:
    """Those too that come out only when the decoder is emptied, which had none."""
    frames = decoded(container(name)).frames
    assert [number_of(pixels) for _, pixels in frames] == [n % CYCLE for n in range(FRAMES)]
    assert [time for time, _ in frames] == pytest.approx(
        [n / RATE for n in range(FRAMES)], abs=1e-3
    )


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "faststart"])
def test_a_stream_cut_anywhere_has_ended(name: str) -> None:
    data = container(name, options={"bf": "0"} if name != "webm" else None)
    for share in (0.6, 0.7, 0.8, 0.9):
        frames = decoded(data[: int(len(data) * share)]).frames
        assert [number_of(pixels) for _, pixels in frames] == [
            n % CYCLE for n in range(len(frames))
        ]


@pytest.mark.parametrize("name", FORMATS)
def test_rubbish_behind_a_good_beginning_is_an_error(name: str) -> None:
    data = container(name)
    for rubbish in (NOISE, bytes(60_000), b"<html></html>\n" * 5_000):
        assert complaint(data + rubbish).reason == "decode_error"
        assert complaint(data[: len(data) * 2 // 3] + rubbish).reason == "decode_error"


def test_what_follows_a_lost_packet_does_not_vanish() -> None:
    """Without a key frame behind it nothing more can be shown: that is no end like another."""

    def with_loss(group: int) -> bytes:
        data = container("mpegts", options={"g": str(group), "bf": "0"})
        packets = [data[first : first + 188] for first in range(0, len(data), 188)]
        video = [n for n, packet in enumerate(packets) if packet[1] & 31 == 1 and not packet[2]]
        del packets[video[len(video) // 2]]
        return b"".join(packets)

    assert complaint(with_loss(1000)).detail.endswith("the container calls a packet corrupt")
    assert FRAMES // 2 < len(decoded(with_loss(8)).frames) < FRAMES


def test_empty_transport_packets_are_no_rubbish() -> None:
    empty = (b"\x47\x1f\xff\x10" + bytes(184)) * 400
    assert len(decoded(container("mpegts") + empty).frames) == FRAMES


def test_a_file_that_cannot_be_read_front_to_back_is_an_error() -> None:
    file = write_video(io.BytesIO(), FRAMES, container="mp4", codec="mjpeg", size=(720, 960))
    data = file.getvalue()
    assert data.index(b"mdat") < data.index(b"moov")
    assert len(data) > 50_000
    error = complaint(data)
    assert error.reason == "decode_error"
    assert "front to back" in error.detail


def test_an_empty_stream_is_an_error() -> None:
    for data in (b"", NOISE, b"\x47" * 1_000):
        assert complaint(data).reason in ("not_a_video", "no_video", "decode_error")


def test_a_source_that_begins_anew_keeps_all_its_frames() -> None:
    """Within the first seconds of its clock, in another size: nothing may be dropped."""
    first, second = container("webm"), container("webm", 20, size=(96, 128))
    frames = decoded(first + second).frames
    expected = [n % CYCLE for n in (*range(FRAMES), *range(20))]
    assert [number_of(pixels) for _, pixels in frames] == expected
    assert frames[FRAMES][0] == 0


def test_times_are_those_of_the_source() -> None:
    times = [2 + Fraction(n * n, 100) for n in range(12)]
    frames = decoded(container("matroska", 12, times=times)).frames
    seconds = [float(time - times[0]) for time in times]
    assert [time for time, _ in frames] == pytest.approx(seconds, abs=1e-3)


# JSON


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_nan_and_infinity_are_never_sent(number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json({"a": [1.0, {"b": float(number)}]})
    with pytest.raises(ValueError, match="JSON compliant"):
        to_text({"start_s": float(number)})
    for encoding in ("float", "base64"):
        with pytest.raises(ApiError) as caught:
            encode_values(np.array([0.0, number], np.float32), encoding)
        assert (caught.value.status, caught.value.code) == (500, "not_finite")


def test_strings_that_hold_the_word_nan_are_sent() -> None:
    value = {"NaN": ["Infinity", "-Infinity", 1.5, None, "é"]}
    assert json.loads(to_json(value)) == value


def test_there_is_one_serialiser() -> None:
    """Others write NaN without complaint; Starlette's own refuses as well."""
    folder = ROOT / "serve"
    texts = {path.name: path.read_text() for path in folder.rglob("*.py")}
    by_itself = re.compile(r"pydantic_core\.to_json\(|model_dump_json\(|orjson")
    assert [name for name, text in texts.items() if by_itself.search(text)] == ["json_text.py"]
    with pytest.raises(ValueError, match="JSON compliant"):
        JSONResponse({"a": float("nan")})


# Over a socket


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("artifact") / "clips"
    save_clip_artifact(folder)
    with local_server(folder) as running:
        yield running


def strict(text: str | bytes) -> dict[str, Any]:
    """What a browser's parser takes."""

    def refuse(name: str) -> None:
        raise ValueError(f"Unexpected token {name}")

    message: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return message


def talk(server: LocalServer, data: bytes) -> tuple[list[dict[str, Any]], int | None]:
    """All messages of a stream of these bytes, and the close code."""
    messages = []
    with connect(f"ws://127.0.0.1:{server.port}/v1/streams", max_size=None) as socket:
        socket.send(json.dumps({"type": "start", "source": "container", "unacknowledged": 64}))
        for first in range(0, len(data), 5_000):
            socket.send(data[first : first + 5_000])
        socket.send(json.dumps({"type": "end"}))
        try:
            while True:
                messages.append(strict(socket.recv(timeout=30)))
                if messages[-1]["type"] == "embedding":
                    # The server may have closed already; what it sent before is still read.
                    with contextlib.suppress(ConnectionClosed):
                        socket.send(json.dumps({"type": "ack", "index": messages[-1]["index"]}))
        except ConnectionClosed:
            return messages, socket.close_code


def test_ends_of_streams_over_a_socket(server: LocalServer) -> None:
    data = container("mpegts")
    (_, *embeddings, ended), code = talk(server, data)
    assert (ended["type"], ended["received"], code) == ("ended", FRAMES, 1000)
    assert embeddings[-1]["end_s"] == pytest.approx((FRAMES - 1) / RATE)
    (*_, error), code = talk(server, data + NOISE)
    assert (error["error"]["code"], code) == ("decode_error", 1007)
    ordinary = write_video(io.BytesIO(), 40, container="mp4", codec="mjpeg", size=(720, 960))
    (*_, error), code = talk(server, ordinary.getvalue())
    assert (error["error"]["code"], code) == ("decode_error", 1007)
