"""Video files that are damaged, refused or long: what can be kept is kept, in bounded memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from helpers.models.video_files import CYCLE, write_sound, write_video
from helpers.pipelines.video_ingestion import CFG, VIDEO, cut, damage, numbers, prepare, refusal
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.preparing.videos import prepare_video
from pipelines.ingestion.reading.items import Item


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_truncated_tail_is_a_loss_and_the_rest_is_kept(name: str, tmp_path: Path) -> None:
    muxer = {"movflags": "+faststart"} if name == "a.mp4" else {}
    path = cut(write_video(tmp_path / name, 120, muxer=muxer), 0.75)
    rows, losses = prepare(path)
    found = [number for row in rows for number in numbers(row)]
    assert found == [n % CYCLE for n in range(0, 3 * len(found), 3)]
    assert 1 <= len(found) < 40
    assert [reason for reason, _ in losses] == ["truncated"]


@pytest.mark.parametrize("at", [0.2, 0.3, 0.4, 0.5])
def test_corrupt_packets_leave_out_only_what_needs_them(at: float, tmp_path: Path) -> None:
    rows, losses = prepare(damage(write_video(tmp_path / "a.mp4", 120), at))
    assert [reason for reason, _ in losses] == ["corrupt"]
    shown = {}
    for row in rows:
        for n, number in enumerate(numbers(row)):
            shown[round(row["start_s"] * 30 + 3 * n)] = number
    assert all(number == time % CYCLE for time, number in shown.items()), "a picture is wrong"
    assert 20 <= len(shown) < 40  # the damage costs at most a few groups of ten
    assert max(shown) >= 114


def test_undamaged_file_has_no_loss(tmp_path: Path) -> None:
    """The control of the tests above."""
    rows, losses = prepare(write_video(tmp_path / "a.mp4", 120))
    assert losses == []
    assert sum(row["num_frames"] for row in rows) == 40


def test_refusals_have_reasons(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    def limits(**changes: object) -> IngestConfig:
        return dataclasses.replace(CFG, video=dataclasses.replace(VIDEO, **changes))  # type: ignore[arg-type]

    good = write_video(tmp_path / "a.mp4", 60)
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n" + str(good).encode() + b"\n"
    assert refusal(file("empty.mp4", b"")) == "empty"
    assert refusal(file("text.mp4", b"<html>" * 100)) == "not_a_video"
    assert refusal(file("list.mp4", playlist)) == "not_a_video"
    assert refusal(file("concat.mp4", b"ffconcat version 1.0\nfile a.mp4\n")) == "not_a_video"
    assert refusal(file("cut.mp4", good.read_bytes()[:2000])) == "truncated"
    assert refusal(write_sound(tmp_path / "sound.mp4")) == "no_video"
    assert refusal(good, limits(max_pixels=48 * 64 - 1)) == "too_many_pixels"
    assert refusal(good, limits(max_seconds=1.9)) == "too_long"
    assert refusal(damage(write_video(tmp_path / "b.mp4", 8), 0.02, 500)) in (
        "decode_error",
        "truncated",
    )
    wide = write_video(tmp_path / "wide.avi", 2, size=(2, 16400), codec="mjpeg")
    assert refusal(wide, dataclasses.replace(CFG, short_side=None)) == "encode_error"


def test_length_that_only_shows_later_is_cut_and_recorded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 30, rate=10, muxer={"live": "1"})  # says no length
    cfg = dataclasses.replace(CFG, video=dataclasses.replace(VIDEO, max_seconds=1.5))
    rows, losses = prepare(path, cfg)
    assert [reason for reason, _ in losses] == ["too_long"]
    assert sum(row["num_frames"] for row in rows) == 16


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    """Decoded, the longer file has 6.6 times as many bytes as the bound."""
    import resource

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    size = (240, 320)
    prepare_all(write_video(tmp_path / "short.mp4", 30, size=size, options={"crf": "40"}))
    before = peak()
    long = write_video(tmp_path / "long.mp4", 900, size=size, options={"crf": "40"})
    before = max(before, peak())
    assert prepare_all(long) == 300
    assert peak() - before < 900 * 240 * 320 * 3 / 6.6


def prepare_all(path: Path) -> int:
    cfg = dataclasses.replace(CFG, short_side=None)
    return sum(row["num_frames"] for row in prepare_video(Item("", path=str(path)), cfg, []))
