"""Videos through `/v1/embeddings`: sampling, pooling, limits and hostile files."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import gc
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from helpers.models.hostile_videos import DEADLINE_S, hostile_videos, slow_to_decode
from helpers.models.video_files import number_of, picture, write_sound, write_video
from helpers.serve.embeddings import (
    data_uri,
    direct_tokens,
    encoded,
    png_uri,
    save_tiny_artifact,
    unit,
)
from helpers.serve.embeddings import picture as still
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
from models.media.preprocessing import EncoderInput, Preprocessing, eval_transform
from models.media.video.containers import VideoError
from serve.embeddings.frontend.service import embed_items
from serve.embeddings.media.inputs import parse_input
from serve.embeddings.media.loader import Item, to_parts
from serve.embeddings.media.sample_video import ClipRequest, sample_times, sample_video
from serve.embeddings.replica.embedder import Encoder
from serve.embeddings.settings import ServeSettings
from serve.ingress.errors import ApiError

PREP = Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
CLEAN = write_video(io.BytesIO(), 30, container="mp4").getvalue()  # one second at 30 frames/s


def request_for(**fields: Any) -> ClipRequest:
    limits = {"max_frames": 64, "max_source_frames": 1000, "max_pixels": 10**6, "max_s": 60.0}
    return ClipRequest(**({"frames": 4} | limits | fields))


def sampled(video: bytes, **fields: Any) -> list[int]:
    pixels, times_s, *_ = sample_video(video, request_for(**fields), PREP)
    assert len(times_s) == len(pixels)
    return [number_of(frame) for frame in pixels]


# Sampling


def test_times_are_the_middles_of_equal_parts_or_a_rate() -> None:
    assert sample_times(8.0, request_for()) == [1.0, 3.0, 5.0, 7.0]
    assert sample_times(8.0, request_for(start_s=4.0)) == [4.5, 5.5, 6.5, 7.5]
    assert sample_times(8.0, request_for(fps=2.0, start_s=1.0, end_s=3.0)) == [1.0, 1.5, 2.0, 2.5]
    assert sample_times(8.0, request_for(fps=0.01)) == [0.0]
    for fields, reason in (
        ({"start_s": 8.0}, "no_such_time"),
        ({"fps": 30.0}, "too_many_frames"),
    ):
        with pytest.raises(VideoError) as caught:
            sample_times(8.0, request_for(**fields))
        assert caught.value.reason == reason


def test_the_frames_shown_at_those_times_are_taken() -> None:
    assert sampled(CLEAN) == [3, 11, 18, 26]  # of 30: at 1/8, 3/8, 5/8 and 7/8
    assert sampled(CLEAN, fps=10.0, start_s=0.5) == [15, 18, 21, 24, 27]
    assert sampled(CLEAN, end_s=0.2) == [0, 2, 3, 5]
    assert sampled(write_video(io.BytesIO(), 1, container="mp4").getvalue()) == [0] * 4
    # Of a variable rate the times count, not the numbers: the last frame is shown at 0.9 s.
    times = [Fraction(number, 100) for number in (0, 1, 2, 3, 4, 5, 90)]
    variable = write_video(io.BytesIO(), 7, times=times, container="mp4").getvalue()
    assert sampled(variable)[1:3] == [5, 5]


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "gif"])
def test_containers(container: str) -> None:
    codec = {"avi": "mpeg4", "gif": "gif"}.get(container, "libx264")
    rate = 25 if container == "gif" else 30  # GIF counts hundredths of a second
    video = write_video(io.BytesIO(), 20, rate=rate, codec=codec, container=container).getvalue()
    np.testing.assert_allclose(sampled(video), [2, 7, 12, 17], atol=1)


def test_rotated_and_anamorphic_video_is_seen_as_a_player_shows_it() -> None:
    for rotation, turns in ((90, 1), (180, 2), (-90, 3)):
        rotated = write_video(io.BytesIO(), 4, rotation=rotation, container="mp4").getvalue()
        pixels, *_ = sample_video(rotated, request_for(), PREP)
        upright = np.rot90(picture(0), turns)
        expected = eval_transform(Image.fromarray(np.ascontiguousarray(upright)), PREP)
        assert np.abs(pixels[0].astype(int) - expected).mean() < 4
    tall = write_video(io.BytesIO(), 4, aspect=Fraction(1, 2), container="mp4").getvalue()
    pixels, *_ = sample_video(tall, request_for(), PREP)
    shown, stored = (
        eval_transform(Image.fromarray(np.ascontiguousarray(p)), PREP).astype(int)
        for p in (picture(0)[:, ::2], picture(0))
    )
    assert np.abs(pixels[0] - shown).mean() < 4
    assert np.abs(pixels[0] - stored).mean() > 4


def test_every_way_to_name_a_video() -> None:
    uri = data_uri(CLEAN, "video/mp4")
    part = {"type": "video_url", "video_url": {"url": uri}, "fps": 2}
    for item, fps in (
        (uri, None),
        ({"video": uri, "fps": 3.5}, 3.5),
        ({"url": uri}, None),
        (part, 2),
        ({"content": [part]}, 2),
    ):
        (reference,) = parse_input([item], max_items=1)
        assert (reference.kind, reference.is_url) == ("video", False)
        assert reference.sampling is not None
        assert reference.sampling.fps == fps
    for item in ("QUJD", {"bytes": "QUJD"}, {"url": "https://a.org/x"}, "https://a.org/x"):
        assert parse_input(item, max_items=1)[0].kind == "image"
        assert parse_input(item, max_items=1, default="video")[0].kind == "video"
    assert parse_input({"image": "QUJD"}, max_items=1, default="video")[0].kind == "image"


@pytest.mark.parametrize(
    ("item", "code", "param"),
    [
        ({"video": "QUJD", "fps": 0}, "invalid_value", "input.fps"),
        ({"video": "QUJD", "fps": True}, "invalid_value", "input.fps"),
        ({"video": "QUJD", "fps": 1e9}, "invalid_value", "input.fps"),
        ({"video": "QUJD", "start_s": -1}, "invalid_value", "input.start_s"),
        ({"video": "QUJD", "start_s": 2, "end_s": 1}, "invalid_value", "input.end_s"),
        ({"video": "QUJD", "frames": 3}, "unknown_field", "input.frames"),
        ({"image": "QUJD", "fps": 3}, "unknown_field", "input.fps"),
        ({"video": "QUJD", "image": "QUJD"}, "invalid_object", "input"),
        ({"type": "image_url", "video_url": "QUJD"}, "invalid_content", "input.type"),
    ],
)
def test_sampling_that_makes_no_sense(item: Any, code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_input(item, max_items=1)
    assert (caught.value.code, caught.value.param) == (code, param)


# Over HTTP


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[LocalServer]:
    with local_server(
        artifact,
        decode_timeout_s=DEADLINE_S,
        decode_memory_mib=100,
        max_video_pixels=2_000_000,
        max_video_s=3_000,
        max_source_frames=20_000,
        max_video_bytes=4_000_000,
        max_queued_videos=64,
    ) as running:
        yield running


def post(server: LocalServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)


def vectors_of(reply: httpx.Response) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    entry = reply.json()["data"][0]
    return np.array(entry["embedding"])


def test_pooling_of_a_clip(server: LocalServer, artifact: Path) -> None:
    pixels, times_s, *_ = sample_video(CLEAN, request_for(), _prep(artifact))
    tokens = direct_clip_tokens(artifact, pixels)
    assert tokens.shape == (FRAMES // TUBELET * PATCHES, WIDTH)
    video = {"video": data_uri(CLEAN, "video/mp4")}
    mean = post(server, input=video)
    np.testing.assert_allclose(vectors_of(mean), unit(tokens.mean(axis=0)), atol=1e-5)
    assert mean.json()["usage"]["prompt_tokens"] == len(tokens)
    assert mean.json()["data"][0]["times_s"] == times_s
    steps = post(server, input=video, pooling="per_frame", normalize=False)
    expected = tokens.reshape(FRAMES // TUBELET, PATCHES, WIDTH).mean(axis=1)
    np.testing.assert_allclose(vectors_of(steps), expected, atol=1e-5)
    assert steps.json()["data"][0]["shape"] == [FRAMES // TUBELET, WIDTH]
    all_tokens = post(server, input=video, pooling="patches", dimensions=8)
    np.testing.assert_allclose(vectors_of(all_tokens), unit(tokens[:, :8]), atol=1e-5)
    # Another order of the frames must be seen, or time does nothing.
    backwards = direct_clip_tokens(artifact, pixels[::-1]).mean(axis=0)
    assert np.abs(unit(backwards) - vectors_of(mean)).max() > 1e-3


def _prep(artifact: Path) -> Preprocessing:
    from models.artifacts.artifact import load_artifact

    return load_artifact(artifact).preprocessing


def test_a_longer_range_is_several_clips(server: LocalServer, artifact: Path) -> None:
    """Five frames: a clip of four, and one of a single time step, its only frame repeated; the mean
    is that of all tokens, not of the clips.
    """
    pixels, *_ = sample_video(CLEAN, request_for(fps=10.0, end_s=0.5), _prep(artifact))
    assert len(pixels) == 5
    first = direct_clip_tokens(artifact, pixels[:4])
    second = direct_clip_tokens(artifact, np.concatenate([pixels[4:], pixels[-1:]]))
    assert len(second) == len(first) // 2
    item = {"video": base64.b64encode(CLEAN).decode(), "fps": 10, "end_s": 0.5}
    tokens = np.concatenate([first, second])
    mean = vectors_of(post(server, input=[item]))
    np.testing.assert_allclose(mean, unit(tokens.mean(axis=0)), atol=1e-5)
    by_clips = unit((first.mean(axis=0) + second.mean(axis=0)) / 2)
    assert np.abs(mean - by_clips).max() > 1e-3
    steps = vectors_of(post(server, input=item, pooling="per_frame"))
    assert steps.shape == (3, WIDTH)
    np.testing.assert_allclose(steps[2], unit(second[:PATCHES].mean(axis=0)), atol=1e-5)


def test_images_and_videos_in_one_request(server: LocalServer, artifact: Path) -> None:
    uri = data_uri(CLEAN, "video/mp4")
    reply = post(server, input=[png_uri(3), uri, png_uri(4), {"video": uri, "fps": 4}])
    together = [np.array(entry["embedding"]) for entry in reply.json()["data"]]
    image = direct_tokens(artifact, encoded(still(3))).mean(axis=0)  # a clip of one time step
    np.testing.assert_allclose(together[0], unit(image), atol=1e-5)
    for index, item in ((1, uri), (2, png_uri(4))):
        np.testing.assert_allclose(together[index], vectors_of(post(server, input=item)), atol=1e-5)
    assert "times_s" not in reply.json()["data"][0]
    model = httpx.get(f"{server.url}/v1/models/clips").json()
    assert (model["modality"], model["frames"], model["tubelet"]) == ("video", FRAMES, TUBELET)
    assert model["num_patches"] == PATCHES


def test_an_image_encoder_pools_frames(tmp_path: Path) -> None:
    save_tiny_artifact(tmp_path / "tiny")
    encoder = Encoder(ServeSettings(artifact=str(tmp_path / "tiny")))
    card, prep = encoder.card, encoder.preprocessing
    pixels, _, _, size = sample_video(CLEAN, request_for(frames=3), prep)
    item = Item([EncoderInput(part) for part in to_parts(pixels, card)], size)
    frames = [encoded(Image.fromarray(frame)) for frame in pixels]  # of the model's size already
    expected = np.stack([direct_tokens(tmp_path / "tiny", f).mean(axis=0) for f in frames])

    async def embed(images: Sequence[EncoderInput], pooling: Any, _: Any) -> list[np.ndarray]:
        return encoder.run([(image, pooling) for image in images])

    (steps,) = asyncio.run(embed_items([item], "per_frame", card, embed))
    np.testing.assert_allclose(steps, expected, atol=1e-5)
    (mean,) = asyncio.run(embed_items([item], "mean", card, embed))
    np.testing.assert_allclose(mean, expected.mean(axis=0), atol=1e-5)


# Files made to do harm


def children(pid: int) -> dict[int, str]:
    """Command lines of a process's descendants."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
            parents[int(folder.name)] = int(fields[1])
        except (OSError, ValueError):
            continue
    found = {pid}
    for _ in range(3):
        found |= {child for child, parent in parents.items() if parent in found}
    return {child: names[child] for child in found - {pid} if "decode_worker" in names[child]}


def resident_mib() -> float:
    """Of this process, without what the allocator keeps of memory that was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_hostile_videos_get_typed_errors_in_time(server: LocalServer) -> None:
    cases = hostile_videos(CLEAN)
    assert len(cases) >= 40
    good = {"video": data_uri(CLEAN, "video/mp4")}
    expected = vectors_of(post(server, input=good))

    def send(case: Any) -> tuple[httpx.Response, float]:
        started = time.monotonic()
        item = {"video": data_uri(case.data, case.media_type), "fps": case.fps}
        return post(server, input=item), time.monotonic() - started

    with ThreadPoolExecutor(2) as threads:  # as many as are decoded at once: none waits for a place
        replies = list(threads.map(send, cases))
    lines = []
    for case, (reply, seconds) in zip(cases, replies, strict=True):
        code = "" if reply.status_code == 200 else reply.json()["error"]["code"]
        lines.append(f"{case.name:24} {reply.status_code} {code:24} {seconds:.2f} s")
        assert reply.status_code in (200, 400, 413), lines[-1]
        # However busy this machine is; `slow to decode` would take much longer.
        assert seconds < 6 * DEADLINE_S, lines[-1]
        if case.codes:
            assert code in case.codes, lines[-1]
            assert reply.json()["error"]["param"] == "input.video"
    assert sum(reply.status_code == 200 for reply, _ in replies) < len(cases) / 2
    np.testing.assert_allclose(vectors_of(post(server, input=good)), expected, atol=1e-6)
    assert server.parts.service.admission.videos == 0
    wait_until(lambda: len(children(os.getpid())) == 1)  # the template is left
    after = resident_mib()
    large = [c for c in cases if c.name in ("too many bytes", "100,000 frames", "much memory")]
    for case in large * 6:  # 72 MB of requests
        send(case)
    assert resident_mib() < after + 64
    print("\n".join(lines))  # `pytest -rP` shows them


def test_a_killed_template_process_is_replaced(server: LocalServer) -> None:
    (template,) = children(os.getpid())
    os.kill(template, 9)
    assert post(server, input={"video": data_uri(CLEAN, "video/mp4")}).status_code == 200
    assert children(os.getpid()).keys() != {template}


def test_a_leaving_client_ends_the_decoding(server: LocalServer) -> None:
    service = server.parts.service
    body = json.dumps({"input": {"video": data_uri(slow_to_decode(), "video/webm")}}).encode()
    request = asyncio.run_coroutine_threadsafe(service.answer(body), server.loop)
    wait_until(lambda: len(children(os.getpid())) == 2)
    request.cancel()  # what Serve does when a client leaves
    wait_until(lambda: len(children(os.getpid())) == 1)
    assert (service.admission.videos, service.media.decoders.busy) == (0, 0)


def test_videos_off_and_too_many(artifact: Path) -> None:
    video = {"video": data_uri(CLEAN, "video/mp4")}
    with local_server(artifact, decode_processes=0, max_queued_videos=2) as server:
        assert post(server, input=video).json()["error"]["code"] == "unsupported_modality"
        assert post(server, input=[video] * 3).json()["error"]["code"] == "too_many_items"
        assert post(server, input=png_uri(1)).status_code == 200


def test_a_file_with_sound_only_is_refused(server: LocalServer, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "sound.mp4").read_bytes()
    reply = post(server, input={"video": data_uri(sound, "video/mp4")})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "no_video")
