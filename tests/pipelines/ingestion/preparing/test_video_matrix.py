"""Well over a hundred odd videos (tests/helpers/models/odd_videos.py): in ingest, in requests and
in live streams, every frame is the one that FFmpeg shows at its place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.models.odd_videos import LONG, SHORT, OddVideos, recipes
from helpers.pipelines.video_ingestion import CFG, prepare
from helpers.serve.stream_replica import Replica
from models.media.preprocessing import Preprocessing
from models.media.video.containers import VideoError
from models.media.video.video_reader import TimedFrame
from models.media.videos import count_frames, decode_frames
from pipelines.ingestion.preparing.segments import Segmenter
from serve.embeddings.media.live_video import decode_stream
from serve.embeddings.media.sample_video import ClipRequest, sample_video

RECIPES = recipes()
SIDE = 2 * SHORT
PREP = Preprocessing(image_size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
FAR = 8  # mean difference of grey levels; other frames are at least twice as far
STREAMED = (".ts", ".mkv", ".webm")
IN_ORDER = ("fast.mp4", "fragmented.mp4", "cut-fragmented.mp4", "cut-h264long.mp4", "sound.mp4")
IN_ORDER += ("subtitles.mov",)
NOT_FILES = (".ts", ".flv", ".ogg")  # neither for ingest nor for requests
UNTIMED = ("xvid.mkv", "cut-xvid.mkv")  # libxvid's own times go back
UNTIMED += tuple(f"joined-{codec}.mp4" for codec in ("h264open", "hevcopen", "mpeg4b"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> OddVideos:
    return OddVideos(tmp_path_factory.mktemp("odd"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TimedFrame, np.ndarray]]:
    """What the segmenter is given by ingest."""
    frames: list[tuple[TimedFrame, np.ndarray]] = []
    push = Segmenter.push

    def recording(self: Segmenter, frame: TimedFrame) -> Iterator[Any]:
        frames.append((frame, self._upright(frame)))
        return push(self, frame)

    monkeypatch.setattr(Segmenter, "push", recording)
    return frames


def thumbnail(pixels_HW3: np.ndarray, like_HW: np.ndarray) -> np.ndarray:
    height, width = like_HW.shape
    image = Image.fromarray(pixels_HW3).convert("L").resize((width, height), Image.Resampling.BOX)
    return np.asarray(image).astype(int)


def check(found: list[np.ndarray], expected: np.ndarray, what: str) -> None:
    """Each frame is the one that it should be."""
    far = [
        n
        for n, (pixels, reference) in enumerate(zip(found, expected, strict=True))
        if np.abs(thumbnail(pixels, reference) - reference).mean() > FAR
    ]
    assert not far, f"{what}: frames {far} are others"


def squares(thumbnails: np.ndarray) -> np.ndarray:
    """What the transform of evaluation leaves of them: the middle."""
    height, width = thumbnails.shape[1:]
    top, left = (height - SHORT) // 2, (width - SHORT) // 2
    return thumbnails[:, top : top + SHORT, left : left + SHORT]


def request_for(**fields: Any) -> ClipRequest:
    limits = {"max_frames": 200, "max_source_frames": 500, "max_pixels": 10**6, "max_s": 99.0}
    return ClipRequest(**({"frames": 5} | limits | fields))


@pytest.mark.parametrize("name", RECIPES)
def test_frames_are_those_that_ffmpeg_shows(
    name: str, videos: OddVideos, seen: list[tuple[TimedFrame, np.ndarray]]
) -> None:
    path = videos.path(name)
    shown, times = videos.shown(name)
    times = [] if name.endswith(".avi") else times
    turns = {"turned-90.mp4": 1, "turned-180.mov": 2, "turned-270.mkv": 3, "turned-cut.mp4": 1}
    if name.endswith(NOT_FILES) or not len(shown):
        with pytest.raises(VideoError):
            prepare(path)
        with pytest.raises(VideoError):
            sample_video(path.read_bytes(), request_for(), PREP)
    else:
        check_ingest(path, shown, times, seen)
        check_requests(path.read_bytes(), shown, times, turns.get(name, 0))
    check_stream(name, path.read_bytes(), shown, times)


def ascends(times: list[float]) -> bool:
    """Whether times can be compared: those of AVI, in decoding order, are nobody's."""
    return bool(times) and all(a < b for a, b in itertools.pairwise(times))


def check_ingest(
    path: Path, shown: np.ndarray, times: list[float], seen: list[tuple[TimedFrame, np.ndarray]]
) -> None:
    rows, losses = prepare(path)
    assert rows
    assert [reason for reason, _ in losses] == ["out_of_order"] * (path.name in UNTIMED)
    assert [frame.index for frame, _ in seen] == list(range(len(shown)))
    check([pixels for _, pixels in seen], shown, "ingest")
    if ascends(times):
        found = [float(frame.time) for frame, _ in seen]
        assert found == pytest.approx(times, abs=2e-3)


def check_requests(data: bytes, shown: np.ndarray, times: list[float], turns: int) -> None:
    assert count_frames(data) == len(shown)
    singly = [np.rot90(decode_frames(data, [n])[0], turns) for n in range(len(shown))]
    check(singly, shown, "one by one")
    if len({pixels.shape for pixels in singly}) == 1:
        some = list(range(1, len(shown), 3))
        check([np.rot90(f, turns) for f in decode_frames(data, some)], shown[some], "some")
    pixels, times_s, duration_s, _ = sample_video(data, request_for(frames=11), PREP)
    assert times_s == sorted(times_s)
    if ascends(times):
        numbers = [int(np.argmin(np.abs(np.array(times) - time))) for time in times_s]
        check(list(pixels), squares(shown[numbers]), "sampled")
        for n, number in enumerate(numbers):
            until = [*times, duration_s][number + 1]
            assert times[number] - 2e-3 <= (n + 0.5) * duration_s / 11 <= until + 2e-3


def check_stream(name: str, data: bytes, shown: np.ndarray, times: list[float]) -> None:
    replica = Replica(data, side=SIDE)
    try:
        decode_stream(replica, PREP, clock=lambda running: None, max_pixels=10**6)
    except VideoError:  # small files may fit into FFmpeg's buffer, which can then seek
        assert not name.endswith(STREAMED)
        assert name not in IN_ORDER
        return
    assert not name.endswith((".avi", ".gif", ".flv", ".ogg"))
    check([pixels for _, pixels in replica.frames], squares(shown), "stream")
    if ascends(times):
        assert [time for time, _ in replica.frames] == pytest.approx(times, abs=2e-3)


def test_there_are_enough_and_wrong_frames_would_be_seen(videos: OddVideos) -> None:
    assert len(RECIPES) >= 120
    shown, times = videos.shown("h264b.mp4")
    assert len(shown) == 34
    assert times == pytest.approx([n / 30 for n in range(34)], abs=1e-5)
    assert shown.shape[1:] == (SHORT, LONG)
    apart = np.abs(shown[:, None].astype(int) - shown[None]).mean((2, 3))
    assert apart[~np.eye(34, dtype=bool)].min() > 2 * FAR
    assert CFG.video.max_seconds > 2
