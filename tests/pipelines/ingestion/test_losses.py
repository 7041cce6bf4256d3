"""Reasons in `losses` of the manifest and in the quarantine that damage alone does not give."""

from __future__ import annotations

import io
import socket
import struct
import threading
from fractions import Fraction
from pathlib import Path

import av
import pytest

from helpers.models.video_files import picture, write_video
from helpers.pipelines.live_streams import FRAMES, Following, config, frames_in
from helpers.pipelines.video_ingestion import prepare
from helpers.waiting import wait_until
from models.media.video.containers import VideoError
from pipelines.dataset.shards import read_manifest


def _write(path: Path, times_ms: list[int]) -> Path:
    """Motion JPEG whose frames are shown at these times, in the order of the file."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        file.start_encoding()
        for number, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(picture(number), "rgb24").reformat(format="yuvj420p")
            frame.time_base, frame.pts = Fraction(1, 1000), 33 * number
            for packet in stream.encode(frame):
                packet.pts, packet.dts = time, number  # the muxer wants dts to grow
                file.mux(packet)
    return path


def test_a_stream_that_holds_no_frame_is_no_frames(tmp_path: Path) -> None:
    with pytest.raises(VideoError) as error:
        prepare(_write(tmp_path / "empty.avi", []))
    assert error.value.reason == "no_frames"


def test_frames_whose_time_goes_back_are_counted_out_of_order(tmp_path: Path) -> None:
    times = [0, 33, 67, 100, 90, 133, 167, 155, 200]
    rows, losses = prepare(_write(tmp_path / "back.mkv", times))
    assert losses == [("out_of_order", "2 frames with times that go back")]
    assert len(rows) == 1
    assert prepare(_write(tmp_path / "right.mkv", sorted(times)))[1] == []


def test_a_connection_that_is_reset_is_a_connection_lost(tmp_path: Path) -> None:
    transport = write_video(io.BytesIO(), FRAMES, container="mpegts", options={"g": "7"}).getvalue()
    seen = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener:
            first, _ = listener.accept()
            first.sendall(transport)
            seen.wait(30)
            # Closed by a reset, as a camera that loses its power does sooner or later.
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            first.close()
            second, _ = listener.accept()
            with second:
                second.sendall(transport)

    server = threading.Thread(target=serve)
    server.start()
    out = tmp_path / "out"
    with Following(config(f"tcp://127.0.0.1:{listener.getsockname()[1]}", out)):
        wait_until(lambda: frames_in(out) > 0)
        before = frames_in(out)
        seen.set()
        wait_until(lambda: not server.is_alive())
        wait_until(lambda: frames_in(out) > before + 20)
    server.join()
    assert read_manifest(out).losses.get("connection_lost") == 1
