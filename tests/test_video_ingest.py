"""Video ingest: every kind of file comes out right or with its reason, and nothing is lost."""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.video_decode import VideoError, decode_frames
from pipelines import ingest as ingest_module
from pipelines.config import IngestConfig, VideoConfig
from pipelines.ingest import ingest
from pipelines.readers import Item
from pipelines.segmenting import SegmentEncoder
from pipelines.shards import LOSSES, MANIFEST, hash_bytes, read_manifest, read_rows, verify_shards
from pipelines.staging import STAGING
from pipelines.video_preparing import prepare_video, segment_id
from tests.video_files import CYCLE, number_of, picture, write_sound, write_video

VIDEO = VideoConfig(fps=10, segment_seconds=1, key_frame_every=4, crf=1)
CFG = IngestConfig(source="/x", out="/y", modality="video", video=VIDEO)


def prepare(
    path: Path, cfg: IngestConfig = CFG, **sidecars: np.ndarray
) -> tuple[list[dict], list[tuple[str, str]]]:
    """Returns the rows of a file and the losses; a refusal after the first row is a loss."""
    losses: list[tuple[str, str]] = []
    rows = []
    try:
        files = tuple((name, npy(values)) for name, values in sidecars.items())
        for row in prepare_video(Item(str(path), path=str(path), sidecars=files), cfg, losses):
            rows.append(row)
    except VideoError as error:
        if not rows:
            raise
        losses.append((error.reason, error.detail))
    return rows, losses


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def numbers(row: dict) -> list[int]:
    """Numbers of the frames that a segment shows."""
    return [number_of(frame) for frame in decode_frames(row["video"], range(row["num_frames"]))]


def refusal(path: Path, cfg: IngestConfig = CFG, **sidecars: np.ndarray) -> str:
    with pytest.raises(VideoError) as caught:
        prepare(path, cfg, **sidecars)
    assert caught.value.detail
    return caught.value.reason


# -------------------------------------------------------------------------------- good files


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("a.mov", {}),
        ("a.mkv", {}),
        ("a.avi", {}),
        ("a.avi", {"codec": "mpeg4", "options": {"b": "5000k", "g": "10"}}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"crf": "2", "b": "0", "cpu-used": "8"}}),
        ("sound.mp4", {"audio": True}),
        ("sound.mkv", {"audio": True}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else value.get("codec", ""),
)
def test_every_container_gives_the_same_segments(name: str, options: dict, tmp_path: Path) -> None:
    rows, losses = prepare(write_video(tmp_path / name, 40, **options))
    assert losses == []
    assert [numbers(row) for row in rows] == [list(range(0, 30, 3)), [30, 33, 36]]
    assert [(r["num_frames"], r["start_s"], r["fps"]) for r in rows] == [(10, 0, 10), (3, 1, 10)]
    assert {(r["height"], r["width"]) for r in rows} == {(48, 64)}


def test_gif_by_its_frame_times(tmp_path: Path) -> None:
    rows, losses = prepare(write_video(tmp_path / "a.gif", 20, rate=10, codec="gif"))
    assert losses == []
    assert [row["num_frames"] for row in rows] == [10, 10]
    found = np.array([number for row in rows for number in numbers(row)])
    assert np.abs(found - np.arange(20)).max() <= 2  # 3 bits a colour


def test_segments_stand_alone_and_begin_with_a_key_frame(tmp_path: Path) -> None:
    rows, _ = prepare(write_video(tmp_path / "a.mp4", 60))
    for row in rows:
        with av.open(io.BytesIO(row["video"])) as file:
            stream = file.streams.video[0]
            packets = [packet for packet in file.demux(stream) if packet.size]
            assert [packet.is_keyframe for packet in packets] == [
                n % 4 == 0 for n in range(row["num_frames"])
            ]
            assert [p.pts * p.time_base for p in packets] == [
                Fraction(n, 10) for n in range(row["num_frames"])
            ]
            assert all(packet.pts == packet.dts for packet in packets)
            assert stream.average_rate == 10


def test_rate_is_kept_exactly_by_millisecond_timestamps(tmp_path: Path) -> None:
    """Matroska rounds times to milliseconds; no frame may be skipped or shown twice for that."""
    cfg = dataclasses.replace(CFG, video=dataclasses.replace(VIDEO, fps=30, segment_seconds=10))
    rows, _ = prepare(write_video(tmp_path / "a.mkv", 45), cfg)
    assert [numbers(row) for row in rows] == [[n % CYCLE for n in range(45)]]


def test_slower_sources_repeat_frames(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, video=dataclasses.replace(VIDEO, fps=20, segment_seconds=10))
    rows, _ = prepare(write_video(tmp_path / "a.mp4", 10, rate=10), cfg)
    assert len(numbers(rows[0])) == 20
    assert sorted(set(numbers(rows[0]))) == list(range(10))


def test_variable_frame_rate_is_resampled_by_time(tmp_path: Path) -> None:
    times = [Fraction(n, 30) for n in range(10)] + [2 + Fraction(n, 5) for n in range(5)]
    rows, losses = prepare(write_video(tmp_path / "a.mp4", 15, times=times))
    assert losses == []
    found = [number for row in rows for number in numbers(row)]
    seconds = [row["start_s"] + n / 10 for row in rows for n in range(row["num_frames"])]
    assert seconds == pytest.approx([n / 10 for n in range(len(found))])
    # An independent rule: the frame nearest in time, the earlier one behind it in a gap.
    for second, number in zip(seconds[:29], found, strict=False):
        before = max(n for n, time in enumerate(times) if time <= second + 1e-9)
        assert number in (before, before + 1), (second, number)
    assert found[:4] == [0, 3, 6, 9]
    assert set(found[4:20]) == {9}
    assert found[20:29] == [10, 10, 11, 11, 12, 12, 13, 13, 14]


def test_long_gap_is_not_filled_with_a_still(tmp_path: Path) -> None:
    times = [Fraction(n, 30) for n in range(10)] + [20 + Fraction(n, 30) for n in range(10)]
    rows, losses = prepare(write_video(tmp_path / "a.mkv", 20, times=times))
    assert losses == []
    assert [(row["start_s"], numbers(row)) for row in rows] == [(0, [0, 3, 6]), (20, [10, 13, 16])]


def test_missing_frames_are_bridged_by_the_last_one(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30, codec="mjpeg", drop=(10, 11, 12, 13))
    rows, _ = prepare(path)
    found = numbers(rows[0])
    assert len(found) == 10
    assert np.abs(np.array(found) - [0, 3, 6, 9, 9, 15, 18, 21, 24, 27]).max() <= 1  # lossy


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (-90, -1), (180, 2)])
def test_rotation_flag_is_applied(rotation: int, turns: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 5, rotation=rotation)
    expected = np.rot90(picture(0), turns)  # numpy turns counter-clockwise
    rows, _ = prepare(path)
    seen = decode_frames(rows[0]["video"], [0])[0]
    assert (rows[0]["height"], rows[0]["width"]) == seen.shape[:2] == expected.shape[:2]
    assert np.abs(seen.astype(int) - expected).mean() < 3
    assert np.abs(np.rot90(seen, 2).astype(int) - expected).mean() > 20


def test_rotation_is_the_one_phones_write(tmp_path: Path) -> None:
    """QuickTime: (x, y) -> (ax + cy, bx + dy), y down; a portrait video has (0, 1, -1, 0)."""
    data = write_video(tmp_path / "a.mp4", 5, rotation=-90).read_bytes()
    header = data.index(b"tkhd") + 4
    matrix = np.frombuffer(data[header + 40 : header + 76], ">i4") / 65536
    assert matrix[[0, 1, 3, 4]].tolist() == [0, 1, -1, 0]  # clockwise
    rows, _ = prepare(tmp_path / "a.mp4")
    seen = decode_frames(rows[0]["video"], [0])[0]
    assert seen[:20, 34:].mean() > 200  # the band of the top left is at the top right


def test_pixels_that_are_not_square_become_square(tmp_path: Path) -> None:
    rows, _ = prepare(write_video(tmp_path / "a.mp4", 5, aspect=Fraction(2)))
    assert (rows[0]["height"], rows[0]["width"]) == (48, 128)


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((48, 64), 24, (24, 32)),
        ((64, 48), 24, (32, 24)),
        ((48, 64), 200, (48, 64)),
        ((50, 66), 33, (32, 44)),
    ],
)
def test_short_side(
    size: tuple[int, int], short: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    cfg = dataclasses.replace(CFG, short_side=short)
    rows, _ = prepare(write_video(tmp_path / "a.mp4", 5, size=size), cfg)
    assert (rows[0]["height"], rows[0]["width"]) == expected
    assert decode_frames(rows[0]["video"], [0]).shape[1:3] == expected


def test_single_frame_is_one_frame(tmp_path: Path) -> None:
    rows, losses = prepare(write_video(tmp_path / "a.mp4", 1))
    assert [numbers(row) for row in rows] == [[0]]
    assert losses == []


def test_pictures_come_back_in_colour(tmp_path: Path) -> None:
    """Red stays red through all conversions, within what 8-bit YUV can hold."""
    colour = np.array([200, 40, 90])
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "1"}
        pixels = np.broadcast_to(colour.astype(np.uint8), (48, 64, 3))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    rows, _ = prepare(path)
    seen = decode_frames(rows[0]["video"], [0])[0].astype(int)
    assert np.abs(seen - colour).max() <= 4
    np.testing.assert_allclose(rows[0]["moments"][:3], colour / 255, atol=0.02)
    np.testing.assert_allclose(rows[0]["moments"][3:], (colour / 255) ** 2, atol=0.03)


# -------------------------------------------------------------------------------- sidecars


def test_sidecars_follow_the_frames_shown(tmp_path: Path) -> None:
    actions = np.stack([np.arange(40), np.arange(40) ** 2], axis=1).astype(np.float64)
    rows, _ = prepare(write_video(tmp_path / "a.mp4", 40), actions=actions, states=np.arange(40))
    shown = [[0, 3, 6, 9, 12, 15, 18, 21, 24, 27], [30, 33, 36]]
    assert [row["actions"] for row in rows] == [[[n, n * n] for n in part] for part in shown]
    assert [row["states"] for row in rows] == [[[n] for n in part] for part in shown]


def test_sidecars_stay_aligned_behind_damage(tmp_path: Path) -> None:
    path = damage(write_video(tmp_path / "a.mp4", 90), 0.4)
    rows, losses = prepare(path, states=np.arange(90))
    assert [reason for reason, _ in losses] == ["corrupt"]
    late = [row for row in rows if row["start_s"] >= 1.5]
    assert late
    for row in late:
        assert [int(value) % CYCLE for (value,) in row["states"]] == numbers(row)


@pytest.mark.parametrize(
    "values",
    [np.zeros(39), np.zeros(41), np.zeros((40, 2, 2)), np.array(["a"] * 40), np.zeros(0)],
    ids=["short", "long", "3d", "text", "none"],
)
def test_sidecar_that_does_not_fit_is_refused(values: np.ndarray, tmp_path: Path) -> None:
    assert refusal(write_video(tmp_path / "a.mp4", 40), actions=values) == "bad_sidecar"


def test_sidecar_that_is_no_array_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    for data in (b"", b"no numpy", npy(np.array([{}], object)), npy(np.zeros(9))[:-9]):
        item = Item(str(path), path=str(path), sidecars=(("states", data),))
        with pytest.raises(VideoError, match="bad_sidecar"):
            list(prepare_video(item, CFG, []))


# -------------------------------------------------------------------------------- damage


def damage(path: Path, at: float, count: int = 60) -> Path:
    data = bytearray(path.read_bytes())
    start = int(len(data) * at)
    data[start : start + count] = bytes(count)
    path.write_bytes(data)
    return path


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


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


# -------------------------------------------------------------------------------- identity


def test_ids_are_of_bytes_place_and_settings(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    digest = hash_bytes(path.read_bytes())
    rows, _ = prepare(path)
    ids = [row["sample_id"] for row in rows]
    assert ids == [segment_id(digest, n, CFG) for n in range(2)]
    other = [
        dataclasses.replace(CFG, short_side=32),
        *(
            dataclasses.replace(CFG, video=dataclasses.replace(VIDEO, **{name: value}))
            for name, value in (("fps", 5.0), ("crf", 2), ("segment_seconds", 0.5))
        ),
    ]
    assert len({ids[0], *(segment_id(digest, 0, cfg) for cfg in other)}) == 5
    limit = dataclasses.replace(CFG, video=dataclasses.replace(VIDEO, max_seconds=9.0))
    assert segment_id(digest, 0, limit) == ids[0]
    (tmp_path / "b.mp4").write_bytes(path.read_bytes())
    again, _ = prepare(tmp_path / "b.mp4")
    assert again == rows, "same source and settings, same bytes"


@pytest.mark.parametrize("size", [(64, 84), (64, 64)])
def test_same_frames_same_bytes_whatever_lay_in_memory(size: tuple[int, int]) -> None:
    """With all of x264's assembler, a width of 84 gave 2 to 6 different files in 12 runs."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (20, size[0] // 4, size[1] // 4, 3), np.uint8)
    found = set()
    for run in range(12):
        noise = [rng.bytes(100_000 + run) for _ in range(20)]
        del noise
        encoder = SegmentEncoder(VideoConfig(), size, Fraction(0))
        for number, frame in enumerate(blocks.repeat(4, 1).repeat(4, 2)):
            encoder.add(frame, number)
        found.add(encoder.close().video)
    assert len(found) == 1


# -------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good files of three classes, two duplicates, sidecars, one loss, five refusals."""
    root = tmp_path_factory.mktemp("footage")
    for index in range(12):
        folder = root / f"class{index % 3}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{index:02d}.{('mp4', 'mkv', 'mov', 'avi')[index % 4]}"
        write_video(path, 20 + 3 * index)
        if index % 2:
            np.save(path.with_suffix(".actions.npy"), np.arange(20 + 3 * index))
    (root / "class0" / "again.mp4").write_bytes((root / "class0" / "00.mp4").read_bytes())
    (root / "class1" / "again.avi").write_bytes((root / "class0" / "03.avi").read_bytes())
    cut(write_video(root / "cut.mkv", 90), 0.6)
    write_sound(root / "sound.mp4")
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.webm").write_text("not found")
    (root / "lost.mp4").symlink_to("/nonexistent/video")
    with (root / "large.mp4").open("wb") as file:
        file.truncate(10_000_001)  # sparse
    (root / "notes.txt").write_text("ignored")
    return root


def settings(source: Path, out: Path, **changes: object) -> IngestConfig:
    video = dataclasses.replace(VIDEO, max_bytes=10_000_000)
    base = {"video": video, "shard_bytes": 20_000, "row_group_rows": 4}
    return IngestConfig(source=str(source), out=str(out), **{**base, **changes})  # type: ignore[arg-type]


REASONS = {
    **{"empty": 1, "no_video": 1, "not_a_video": 1},
    **{"too_many_bytes": 1, "unreadable": 1},
}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "_run", run_backwards)
    monkeypatch.setattr(ingest_module.ray, "is_initialized", lambda: True)


def run_backwards(function, rows, cfg, meter) -> None:  # type: ignore[no-untyped-def]
    """Stands in for Ray Data: one process, the last task first."""
    for row in reversed(rows):
        function(row, cfg)


def run_quietly(cfg: IngestConfig) -> bytes:
    ingest(cfg)
    verify_shards(cfg.out)
    names = {path.name for path in Path(cfg.out).iterdir()}
    assert STAGING not in names
    assert not [name for name in names if name.endswith(".tmp")]
    return Path(cfg.out, MANIFEST).read_bytes()


def test_every_file_is_kept_a_duplicate_or_in_quarantine(
    footage: Path, in_process: None, tmp_path: Path
) -> None:
    run_quietly(settings(footage, tmp_path / "out"))
    manifest, rows = read_manifest(tmp_path / "out"), read_rows(tmp_path / "out").to_pylist()
    assert manifest.modality == "video"
    assert manifest.quarantined == REASONS
    assert manifest.duplicates == 2
    assert manifest.losses == {"truncated": 1}
    assert manifest.classes == ("class0", "class1", "class2")
    assert len(manifest.shards) > 1
    assert manifest.num_samples == len(rows) == len({row["sample_id"] for row in rows})
    assert manifest.num_frames == sum(row["num_frames"] for row in rows)
    assert manifest.num_bytes == sum(len(row["video"]) for row in rows)
    names = {Path(row["source_uri"]).name for row in rows}
    assert len(names) == 13
    losses = pq.read_table(tmp_path / "out" / LOSSES).to_pylist()
    assert [Path(row["source_uri"]).name for row in losses] == ["cut.mkv"]
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert {(Path(row["source_uri"]).stem, row["reason"]) for row in quarantine} == {
        *(("empty", "empty"), ("sound", "no_video"), ("text", "not_a_video")),
        *(("large", "too_many_bytes"), ("lost", "unreadable")),
    }


def test_rows_say_what_they_hold(footage: Path, in_process: None, tmp_path: Path) -> None:
    run_quietly(settings(footage, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    for row in read_rows(tmp_path / "out").to_pylist():
        path = Path(row["source_uri"])
        found = numbers(row)
        start = round(row["start_s"] * 30)
        assert found == [(start + 3 * n) % CYCLE for n in range(row["num_frames"])]
        label = manifest.classes.index(path.parent.name) if path.parent != footage else None
        if "again" not in path.name and path.stem not in ("00", "03"):
            assert row["label"] == label
        sidecar = path.with_suffix(".actions.npy")
        expected = [[start + 3 * n] for n in range(row["num_frames"])]
        assert row["actions"] == (expected if sidecar.exists() else None)
        assert row["states"] is None


class Crash(Exception):
    """Stands for the kill."""


def crash(*_: object, **__: object) -> None:
    raise Crash


@pytest.mark.parametrize("where", ["stage_chunk", "merge_shard", "write_manifest", "_clean_up"])
def test_crash_then_again_gives_the_same_bytes(
    where: str,
    footage: Path,
    in_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.sources.VIDEO_CHUNK_ITEMS", 4)
    expected = run_quietly(settings(footage, tmp_path / "whole"))
    cfg = settings(footage, tmp_path / "out")
    with monkeypatch.context() as patch:
        function, calls = getattr(ingest_module, where), []

        def third(row: dict, cfg: IngestConfig) -> dict:
            calls.append(row)
            if len(calls) == 3:
                raise Crash
            return function(row, cfg)  # type: ignore[no-any-return]

        patch.setattr(ingest_module, where, third if where.endswith(("chunk", "shard")) else crash)
        with pytest.raises(Crash):
            ingest(cfg)
    assert any((tmp_path / "out" / STAGING).iterdir())
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / STAGING).glob("*.items.*")}
    assert done
    assert run_quietly(cfg) == expected
    for shard in read_manifest(cfg.out).shards:
        whole = (tmp_path / "whole" / shard.file).read_bytes()
        assert (tmp_path / "out" / shard.file).read_bytes() == whole


@pytest.mark.ray
def test_ray_tasks_give_the_same_bytes_and_done_is_done(
    footage: Path, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sources.VIDEO_CHUNK_ITEMS", 4)
    first = run_quietly(settings(footage, tmp_path / "ray"))
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").iterdir()}
    assert run_quietly(settings(footage, tmp_path / "ray")) == first
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "ray").iterdir()} == stamps
    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "_run", run_backwards)
        assert run_quietly(settings(footage, tmp_path / "here")) == first


def test_changed_sidecar_is_ingested_again(in_process: None, tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    write_video(source / "a.mp4", 20)
    cfg = settings(source, tmp_path / "out")
    run_quietly(cfg)
    assert read_rows(cfg.out)["states"].to_pylist()[0] is None
    np.save(source / "a.states.npy", np.arange(20))
    run_quietly(cfg)
    assert read_rows(cfg.out)["states"].to_pylist()[0] == [[n] for n in range(0, 20, 3)]
    cut(source / "a.mp4", 0.5)
    with pytest.raises(ValueError, match=r"not one good video among 1: \{'truncated': 1"):
        ingest(cfg)
