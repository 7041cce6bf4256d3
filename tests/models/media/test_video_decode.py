"""Frames by number: exact, decoded at little cost, with typed errors for anything but video."""

from __future__ import annotations

import io
import pickle
import types
from fractions import Fraction

import av
import numpy as np
import pytest

from helpers.models.video_files import CYCLE, number_of, write_video
from models.media.preprocessing import Preprocessing
from models.media.video.containers import VideoError, declared_seconds, open_video
from models.media.video.video_reader import FrameDecoder
from models.media.videos import count_frames, decode_frames
from serve.embeddings.media.sample_video import ClipRequest, sample_video


def clip(frames: int = 40, **options: object) -> bytes:
    buffer = io.BytesIO()
    write_video(buffer, frames, container="mp4", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.fixture(scope="module")
def video() -> bytes:
    """A video of 40 frames with B-frames and a key frame every 10."""
    return clip()


@pytest.mark.parametrize(
    "indices", [[0], [39], [17], [9, 10, 11], [35, 2, 2, 20], list(range(40)), [0, 39]]
)
@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_frames_are_those_asked_for(indices: list[int], b_frames: str) -> None:
    frames = decode_frames(clip(options={"bf": b_frames}), indices)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(indices), 48, 64, 3)
    assert [number_of(frame) for frame in frames] == [index % CYCLE for index in indices]


def test_every_frame_is_that_of_a_whole_decode(video: bytes) -> None:
    with av.open(io.BytesIO(video)) as file:
        whole = [f.to_ndarray(format="rgb24").astype(int) for f in file.decode(video=0)]
    for index in range(40):
        seen = decode_frames(video, [index])[0]
        assert np.abs(seen - whole[index]).max() <= 2  # scaling flags differ


def test_no_index_no_frame(video: bytes) -> None:
    assert decode_frames(video, []).shape == (0, 48, 64, 3)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Records the packets that a decoder gets."""
    packets: list[object] = []
    decode = FrameDecoder.decode

    def counting(self: FrameDecoder, packet: object) -> object:
        packets.append(packet)
        return decode(self, packet)  # type: ignore[arg-type]

    monkeypatch.setattr(FrameDecoder, "decode", counting)
    return packets


def test_counting_decodes_nothing(video: bytes, fed: list[object]) -> None:
    assert count_frames(video) == 40
    assert fed == []


@pytest.mark.parametrize(("index", "most"), [(0, 1), (39, 10), (20, 1), (24, 5)])
def test_decoding_starts_at_the_key_frame_before(index: int, most: int, fed: list[object]) -> None:
    video = clip(options={"bf": "0"})
    assert number_of(decode_frames(video, [index])[0]) == index % CYCLE
    assert len(fed) <= most


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_long_group_costs_one_pass(container: str, fed: list[object]) -> None:
    options = {"g": "999", "bf": "0"}
    buffer = io.BytesIO()
    video = write_video(buffer, 120, container=container, options=options).getvalue()
    numbers = list(range(0, 120, 8))
    assert [number_of(f) for f in decode_frames(video, numbers)] == [n % CYCLE for n in numbers]
    assert len(fed) <= 122  # the first frame may be looked at before


def test_variable_times_do_not_confuse_the_numbers() -> None:
    times = [Fraction(n * n, 100) for n in range(20)]
    video = clip(20, times=times)
    assert [number_of(f) for f in decode_frames(video, [19, 3, 11])] == [19, 3, 11]


@pytest.mark.parametrize("indices", [[40], [-1], [0, 1000]])
def test_number_out_of_range(video: bytes, indices: list[int]) -> None:
    with pytest.raises(VideoError, match="no_such_frame"):
        decode_frames(video, indices)


def test_anything_but_a_video_is_refused_with_a_reason(video: bytes) -> None:
    cases = {
        "empty": b"",
        "not_a_video": b"GIF" + bytes(50),
        "truncated": video[: len(video) // 2],
    }
    for reason, data in cases.items():
        with pytest.raises(VideoError) as caught:
            decode_frames(data, [0])
        assert caught.value.reason == reason
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.reason, again.detail) == (caught.value.reason, caught.value.detail)
    with pytest.raises(VideoError, match="too_many_pixels"):
        decode_frames(video, [0], max_pixels=48 * 64 - 1)


def test_damage_is_an_error_or_the_right_frame(video: bytes) -> None:
    """Flipped bytes never cause another exception or a hang."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        data = bytearray(video)
        for at in rng.integers(0, len(data), 8):
            data[at] = rng.integers(256)
        try:
            outcomes.add(decode_frames(bytes(data), [0, 39]).shape[0])
        except VideoError as error:
            outcomes.add(error.reason)
    assert len(outcomes) > 1


PREP = Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
LIMITS = ClipRequest(frames=1, max_frames=9, max_source_frames=999, max_pixels=9_999, max_s=99)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("begin", [0, 2])
def test_declared_length_is_that_of_the_video_beside_sound(container: str, begin: int) -> None:
    times = [begin + Fraction(n, 30) for n in range(60)]
    file = write_video(io.BytesIO(), 60, times=times, audio=True, container=container)
    whole = file.getvalue()
    with open_video(io.BytesIO(whole)) as (opened, stream):
        assert float(declared_seconds(opened, stream) or 0) == pytest.approx(2, abs=0.05)
    assert sample_video(whole, LIMITS, PREP)[2] == pytest.approx(2, abs=0.05)
    if container == "matroska":  # what is cut off an MP4 at its end is the index of it
        with pytest.raises(VideoError, match="truncated"):
            sample_video(whole[: len(whole) * 3 // 4], LIMITS, PREP)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("01:00:02.500000000", Fraction(7205, 2)), ("1e999999999:0:0", None), ("nan:0:0", None)],
)
def test_length_in_a_tag_is_a_clock_s_or_none(written: str, seconds: Fraction | None) -> None:
    """`Fraction("1e999999999")` would be a number of 400 megabytes."""
    stream = types.SimpleNamespace(
        duration=None, time_base=Fraction(1, 1000), start_time=100, metadata={"DURATION": written}
    )
    container = types.SimpleNamespace(duration=None)
    found = declared_seconds(container, stream)  # type: ignore[arg-type]
    assert found == (None if seconds is None else seconds - Fraction(1, 10))
