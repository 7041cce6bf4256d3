"""Ingest of live streams: what is published stays, once each, through breaks and kills."""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import os
import socket
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from helpers.models.video_files import CYCLE, number_of, write_sound, write_video
from helpers.pipelines.live_streams import (
    COMPLETE,
    FRAMES,
    LIVE,
    LONG_S,
    VIDEO,
    WHOLE,
    Following,
    check_numbers,
    config,
    first_key_frame,
    follow_until,
    frames_in,
    ids,
    numbers,
    uris,
)
from helpers.waiting import wait_until
from models.media.videos import decode_frames
from pipelines.dataset import live_set as publishing
from pipelines.dataset.shards import list_names, read_manifest, read_rows, verify_shards
from pipelines.ingestion import live as following
from pipelines.ingestion import live_connection as live_source
from pipelines.ingestion.live import follow
from pipelines.ingestion.live_connection import Connection


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_source, "DRAIN_S", LONG_S)


@pytest.fixture(scope="module")
def transport() -> bytes:
    """Four seconds and a bit as MPEG-TS; the key frames are not where segments begin."""
    return write_video(io.BytesIO(), FRAMES, container="mpegts", options={"g": "7"}).getvalue()


# ---------------------------------------------------------------------------- sources


def test_a_file_that_grows_is_published_while_it_grows(transport: bytes, tmp_path: Path) -> None:
    source, out = tmp_path / "growing.ts", tmp_path / "out"
    half = len(transport) // 2
    source.write_bytes(transport[:half])
    before = dt.datetime.now(dt.UTC)
    with Following(config(source, out)):
        wait_until(lambda: frames_in(out) >= 10)
        early = verify_shards(out)
        assert early.live is not None
        assert early.live["open"]
        first = ids(out)
        with source.open("ab") as file:
            file.write(transport[half:])
        wait_until(lambda: frames_in(out) >= COMPLETE)
    manifest = verify_shards(out)
    check_numbers(out)
    assert ids(out)[: len(first)] == first
    assert len(set(ids(out))) == manifest.num_samples
    rows = read_rows(out).to_pylist()
    assert [row["start_s"] for row in rows[:4]] == pytest.approx([0, 1, 2, 3], abs=1e-4)
    recorded = [row["recorded_at"] for row in rows]
    assert before <= recorded[0] <= recorded[-1] <= dt.datetime.now(dt.UTC)
    assert recorded == sorted(recorded)
    assert manifest.live is not None
    assert not manifest.live["open"]
    assert manifest.live["seconds"] == pytest.approx((manifest.num_frames or 0) / 10)
    assert [shard.file for shard in manifest.shards] == sorted(s.file for s in manifest.shards)


def test_moments_are_those_of_ingest_from_a_file(transport: bytes, tmp_path: Path) -> None:
    """The same frames give the same mean, deviation and segments as a file does."""
    from pipelines.ingestion.preparing.videos import prepare_video
    from pipelines.ingestion.reading.items import Item

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(transport))
    writer.start()
    manifest = follow(config(fifo, tmp_path / "out"))  # ends by itself: the pipe's writer closed it
    writer.join()
    assert manifest.live is not None
    assert not read_manifest(tmp_path / "out").live["open"]
    mp4 = str(write_video(tmp_path / "same.mp4", FRAMES))
    cfg = config("x", tmp_path, modality="video")
    rows = list(prepare_video(Item(mp4, path=mp4), cfg, []))
    moments = np.mean([row["moments"] for row in rows], axis=0)
    np.testing.assert_allclose(manifest.mean, moments[:3], atol=2e-3)
    np.testing.assert_allclose(manifest.std, (moments[3:] - moments[:3] ** 2) ** 0.5, atol=2e-3)
    assert numbers(tmp_path / "out") == WHOLE


def serve(pieces: list[bytes]) -> tuple[int, threading.Thread]:
    """A TCP port that gives each connection one of `pieces`, and closes it; then closes itself."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            for piece in pieces:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(piece)

    thread = threading.Thread(target=run)
    thread.start()
    return listener.getsockname()[1], thread


def test_a_broken_connection_is_made_again(
    transport: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    port, server = serve([transport[: len(transport) // 2], transport])
    with Following(config(f"tcp://user:secret@127.0.0.1:{port}", out)) as following_:
        wait_until(lambda: not server.is_alive())
        wait_until(lambda: frames_in(out) > len(WHOLE) + 10)
    server.join()
    assert following_.error is None
    shown, length = numbers(out), len(WHOLE)
    assert shown[-length:] == WHOLE  # a new connection of a live source is new footage
    assert shown[:-length] == WHOLE[: len(shown) - length]
    assert len(shown) > length + 10
    sources = uris(out).split()
    assert [source.partition("connection=")[2] for source in sources[:: len(sources) - 1]] == [
        "1",
        "2",
    ]
    printed = capsys.readouterr().out
    assert "connecting again in" in printed
    assert "1 reconnects" in printed
    assert "secret" not in printed + str(read_manifest(out)) + uris(out)


def test_a_break_in_the_middle_of_a_packet_is_no_end_of_the_stream(
    transport: bytes, tmp_path: Path
) -> None:
    """What a break spoils is lost, and what follows begins at a key frame."""
    out = tmp_path / "out"
    torn = transport[: len(transport) // 2]
    torn = torn[: len(torn) - len(torn) % 188 + 100]
    cut = len(transport) // 3
    port, server = serve([torn, transport[cut:]])
    with Following(config(f"tcp://127.0.0.1:{port}", out)):
        wait_until(lambda: not server.is_alive())
        wait_until(lambda: frames_in(out) > 0 and "connection=2" in uris(out))
    verify_shards(out)
    rows = read_rows(out).to_pylist()
    second = next(row for row in rows if row["source_uri"].endswith("connection=2"))
    shown = number_of(decode_frames(second["video"], [0])[0])
    assert shown == first_key_frame(transport, cut) % CYCLE
    assert second["start_s"] == 0


@pytest.mark.parametrize("source", ["missing.ts", "folder", "tcp"])
def test_a_source_that_never_opens_is_an_error(source: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"tcp://me:secret@127.0.0.1:{port}" if source == "tcp" else str(tmp_path / source)
    live = dataclasses.replace(LIVE, open_seconds=0.05)
    with pytest.raises(ValueError, match="--source: not open after") as caught:
        follow(config(url, tmp_path / "out", live=live))
    assert "secret" not in str(caught.value)
    assert "manifest.json" not in list_names(tmp_path / "out")


@pytest.mark.parametrize("content", ["sound", "nothing"])
def test_a_file_in_which_no_video_comes_is_an_error(content: str, tmp_path: Path) -> None:
    source = tmp_path / "a.mkv"
    source.touch() if content == "nothing" else write_sound(source)
    live = dataclasses.replace(LIVE, open_seconds=0.3)
    with pytest.raises(ValueError, match=r"not open after 0\.3 s"):
        follow(config(source, tmp_path / "out", live=live))


def test_a_pipe_without_video_is_an_error(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    sound = write_sound(tmp_path / "a.mkv").read_bytes()
    writer = threading.Thread(target=lambda: fifo.write_bytes(sound))
    writer.start()
    with pytest.raises(ValueError, match=r"--source: .*no_video"):
        follow(config(fifo, tmp_path / "out"))
    writer.join()


def test_it_ends_by_itself_and_publishes_all(
    transport: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.ts"
    source.write_bytes(transport)
    monkeypatch.setattr(following.Follower, "_late", lambda self: self._frames >= FRAMES - 9)
    live = dataclasses.replace(LIVE, publish_seconds=1e6)
    manifest = follow(config(source, tmp_path / "out", live=live))
    assert len(manifest.shards) == 1
    check_numbers(tmp_path / "out")


def test_shards_are_published_by_bytes_too(transport: bytes, tmp_path: Path) -> None:
    source, out = tmp_path / "a.ts", tmp_path / "out"
    source.write_bytes(transport)
    live = dataclasses.replace(LIVE, publish_seconds=1e6)
    follow_until(config(source, out, live=live, shard_bytes=1024), COMPLETE)
    shards = read_manifest(out).shards[: COMPLETE // 10]
    assert [shard.rows for shard in shards] == [1] * 4


def test_a_playlist_shows_the_same_again_and_it_is_taken_once(
    transport: bytes, tmp_path: Path
) -> None:
    """An HLS playlist hands its last segments to everyone who connects."""
    out, playlist = tmp_path / "out", tmp_path / "a.m3u8"
    muxer = {"hls_time": "1", "hls_list_size": "0", "hls_playlist_type": "event"}
    write_video(playlist, FRAMES, container="hls", muxer=muxer)
    text = playlist.read_text()
    lines = text.splitlines(keepends=True)
    names = [n for n, line in enumerate(lines) if line.endswith(".ts\n")]
    assert len(names) >= 4
    playlist.write_text("".join(lines[: names[1] + 1]))  # two so far, more to come
    options = ("live_start_index=0",)
    live = dataclasses.replace(LIVE, format="hls", options=options, read_seconds=0.5)
    cfg = config(playlist, out, live=live)
    follow_until(cfg, 10)
    playlist.write_text(text)  # all of it, and its end: from now on it begins anew after each end
    follow_until(cfg, COMPLETE)
    check_numbers(out)
    assert len(set(ids(out))) == read_manifest(out).num_samples


def test_what_waits_is_bounded_in_bytes(
    transport: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_source, "QUEUE_BYTES", 800)
    source = tmp_path / "a.ts"
    source.write_bytes(transport)
    connection = Connection(config(source, tmp_path), lambda: False)
    stream = connection.open()
    assert stream is not None
    largest = held = 0
    for count, packet in enumerate(connection.demux(stream), 1):
        largest = max(largest, packet.size)
        held = max(held, connection._bytes)
        if count == FRAMES - 9:  # the file may grow: its last packet is not known to be whole
            break
    connection.close()
    assert held <= 800 + largest
    assert sum(p.size for p in av.open(str(source)).demux(video=0)) > 2 * (800 + largest)


# ---------------------------------------------------------------------------- kills


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours may handle it."""


def kill(patch: pytest.MonkeyPatch, place: str, times: int) -> None:
    """Makes the process die at the n-th time it comes to a place."""
    module, name, when = {
        "before the shard": (publishing, "write_shard", "before"),
        "between shard and manifest": (publishing, "write_manifest", "before"),
        "after the manifest": (publishing, "write_manifest", "after"),
    }[place]
    original, left = getattr(module, name), [times]

    def wrapped(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            raise Killed
        result = original(*args)
        if left[0] == 0:
            raise Killed
        return result

    patch.setattr(module, name, wrapped)


PLACES = ("before the shard", "between shard and manifest", "after the manifest")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("times", [1, 3])
def test_killed_anywhere_and_run_again_nothing_is_lost_or_doubled(
    place: str, times: int, transport: bytes, tmp_path: Path
) -> None:
    source, out = tmp_path / "a.ts", tmp_path / "out"
    source.write_bytes(transport)
    cfg = config(source, out, shard_bytes=1024)  # a shard a segment
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, place, times)
        with pytest.raises(Killed):
            follow(cfg)
    published = ids(out) if "manifest.json" in list_names(out) else []
    if published:
        verify_shards(out)  # readers see a whole set all the while
    follow_until(cfg, COMPLETE)
    manifest = verify_shards(out)
    assert ids(out)[: len(published)] == published
    assert len(set(ids(out))) == manifest.num_samples
    # A file can be read again, so that even what was not published is there, and once.
    check_numbers(out)
    starts = [row["start_s"] for row in read_rows(out).to_pylist()]
    assert starts[:4] == pytest.approx([0, 1, 2, 3], abs=1e-4)
    shards = {name for name in list_names(out) if name.startswith("part-")}
    assert shards == {shard.file for shard in manifest.shards}
    assert not [name for name in list_names(out) if name.endswith(".tmp")]


def test_another_file_under_the_same_name_is_new_footage(transport: bytes, tmp_path: Path) -> None:
    source, out = tmp_path / "a.ts", tmp_path / "out"
    source.write_bytes(transport)
    cfg = config(source, out)
    follow_until(cfg, COMPLETE)
    first = len(numbers(out))
    source.unlink()
    write_video(tmp_path / "b.ts", FRAMES, options={"g": "9"}).rename(source)
    follow_until(cfg, first + COMPLETE)
    shown = numbers(out)
    assert shown[first:] == WHOLE[: len(shown) - first]
    assert len(set(ids(out))) == read_manifest(out).num_samples


@pytest.mark.parametrize("times", [2, 6, 8])
def test_a_file_of_two_recordings_is_gone_on_with_at_the_right_one(
    times: int, transport: bytes, tmp_path: Path
) -> None:
    """The clock begins anew in the middle: the same times come twice, and are not the same."""
    source, out = tmp_path / "a.ts", tmp_path / "out"
    source.write_bytes(transport + transport)
    cfg = config(source, out, shard_bytes=1024)
    cfg = dataclasses.replace(cfg, video=dataclasses.replace(VIDEO, max_gap=2))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "after the manifest", times)
        with pytest.raises(Killed):
            follow(cfg)
    follow_until(cfg, 2 * COMPLETE)
    shown = numbers(out)
    # The join is damage: the first recording may lack what is not in whole segments.
    joined = [WHOLE[:end] + WHOLE for end in range(COMPLETE, len(WHOLE) + 1)]
    assert shown in [frames[: len(shown)] for frames in joined]
    assert len(set(ids(out))) == read_manifest(out).num_samples


def test_on_s3(
    transport: bytes, s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem(skip_instance_cache=True).mkdirs("live", exist_ok=True)
    source = tmp_path / "a.ts"
    source.write_bytes(transport)
    out = "s3://live/set"
    cfg = dataclasses.replace(config(source, tmp_path), out=out)
    follow_until(cfg, 20)
    follow_until(cfg, COMPLETE)
    manifest = verify_shards(out)
    assert len(set(ids(out))) == manifest.num_samples
    check_numbers(out)
    s3fs.S3FileSystem.clear_instance_cache()
