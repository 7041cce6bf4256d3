"""Settings, metrics and error codes of the embeddings server take effect."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from ray.serve.schema import HTTPOptionsSchema

from helpers.models.video_files import write_video
from helpers.serve.embeddings import SIZE, save_tiny_artifact
from helpers.serve.fake_model import CARD, fake_embed
from helpers.serve.videos import FRAMES, TUBELET, save_clip_artifact
from models.media.preprocessing import EncoderInput
from serve import app
from serve.embeddings.contract import Decoded
from serve.embeddings.media.decode_pool import DecodePool
from serve.embeddings.media.inputs import Reference, Sampling
from serve.embeddings.media.loader import MediaLoader
from serve.embeddings.replica.embedder import Embedder, Encoder, read_card
from serve.embeddings.settings import ServeSettings
from serve.embeddings.streams.messages import StreamStart
from serve.embeddings.streams.stream import LOOKS, Stream, StreamHub
from serve.ingress.deployment import ingress_deployment
from serve.ingress.errors import ApiError
from serve.ingress.websockets import close_code
from serve.replicas.calls import OtherModel
from serve.replicas.served_model import ServedModel

RNG = np.random.default_rng(0)


def pixels(*frames: int) -> EncoderInput:
    return EncoderInput(RNG.integers(0, 256, (*frames, SIZE, SIZE, 3), dtype=np.uint8))


# The encoder


def test_a_mixed_batch_gives_each_its_own_vector(tmp_path: Path) -> None:
    """The batcher mixes requests: an image between two clips and a clip between two images."""
    save_clip_artifact(tmp_path / "clips")
    encoder = Encoder(ServeSettings(artifact=str(tmp_path / "clips"), threads=1))
    items: list[Any] = [
        (pixels(TUBELET), "mean"),
        (pixels(FRAMES), "mean"),
        (pixels(TUBELET), "per_frame"),
        (pixels(FRAMES), "patches"),
        (pixels(TUBELET), "mean"),
    ]
    alone = [encoder.run([item])[0] for item in items]
    for together, expected in zip(encoder.run(items), alone, strict=True):
        np.testing.assert_allclose(together, expected, atol=1e-5)
    assert np.abs(alone[0] - alone[4]).max() > 1e-2  # the vectors do differ
    assert np.abs(alone[0] - alone[1]).max() > 1e-2


@pytest.mark.parametrize(("max_wait_ms", "sizes"), [(0, [2, 1, 1]), (60_000, [2, 2])])
def test_an_idle_model_waits_for_company_as_long_as_the_setting_says(
    max_wait_ms: float, sizes: list[int], tmp_path: Path
) -> None:
    save_tiny_artifact(tmp_path / "tiny")
    settings = ServeSettings(
        artifact=str(tmp_path / "tiny"), threads=1, batch_size=2, max_wait_ms=max_wait_ms
    )

    card = read_card(settings)

    async def run() -> tuple[list[int], CollectorRegistry]:
        telemetry = SimpleNamespace(report=SimpleNamespace(remote=lambda *_: asyncio.sleep(0)))
        embedder = Embedder(settings, telemetry, card)
        seen: list[int] = []
        real = embedder._encoder.run

        def watched(items: list[Any]) -> list[Any]:
            seen.append(len(items))
            return real(items)

        embedder._encoder.run = watched  # type: ignore[method-assign]
        await embedder.embed([pixels(), pixels()], "mean", card.fingerprint)
        first = asyncio.create_task(embedder.embed([pixels()], "mean", card.fingerprint))
        if max_wait_ms == 0:
            await first
        for _ in range(50):  # whatever can begin has begun
            await asyncio.sleep(0)
        await asyncio.gather(first, embedder.embed([pixels()], "mean", card.fingerprint))
        registry = embedder._reporter._registry
        embedder._reporter._task.cancel()
        return seen, registry

    seen, registry = asyncio.run(run())
    assert seen == sizes
    assert registry.get_sample_value("rayjepa_forward_seconds_count") == len(sizes)
    assert registry.get_sample_value("rayjepa_images_total") == 4


# Deployments


def test_settings_reach_the_deployments() -> None:
    fixed = app.model_deployment(ServeSettings(artifact="a", num_replicas=3))
    assert (fixed.num_replicas, fixed._deployment_config.autoscaling_config) == (3, None)
    settings = ServeSettings(artifact="a", num_replicas=2, max_replicas=5, target_ongoing=3.5)
    scaling = app.model_deployment(settings)._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 3.5
    ingress = ingress_deployment(app.Ingress, ServeSettings(artifact="a", ingress_replicas=4))
    assert ingress.num_replicas == 4
    assert ingress._deployment_config.max_queued_requests == -1


@pytest.mark.parametrize("access_log", [False, True])
def test_the_access_log_is_a_setting(access_log: bool) -> None:
    made = ingress_deployment(app.Ingress, ServeSettings(artifact="a", access_log=access_log))
    config = made._deployment_config.logging_config
    assert config is not None
    assert config["enable_access_log"] == access_log


def test_serve_takes_the_tls_options_that_the_docs_name() -> None:
    options = HTTPOptionsSchema.model_validate({"ssl_keyfile": "key", "ssl_certfile": "cert"})
    assert (options.ssl_keyfile, options.ssl_certfile) == ("key", "cert")


# Videos


@pytest.fixture(scope="module")
def video() -> Reference:
    data = write_video(io.BytesIO(), 24, rate=12, container="mp4").getvalue()
    text = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return Reference("input", text, False, Sampling())


def test_frames_of_a_video_for_an_encoder_of_images(video: Reference) -> None:
    """As many as `video_frames`, or by `fps` up to `max_video_frames`."""
    settings = ServeSettings(artifact="a", video_frames=3, max_video_frames=8)

    async def run() -> list[Any]:
        with ThreadPoolExecutor(1) as threads:
            media = MediaLoader(settings, threads)
            try:
                found = [await media.load(video, CARD, CARD.preprocessing)]
                for fps in (4.0, 5.0):  # 8 frames of two seconds, and 10
                    try:
                        one = replace(video, sampling=Sampling(fps=fps))
                        found.append(await media.load(one, CARD, CARD.preprocessing))
                    except ApiError as error:
                        found.append(error)
                return found
            finally:
                await media.close()

    evenly, most, over = asyncio.run(run())
    assert [len(evenly.parts), len(most.parts)] == [3, 8]
    assert isinstance(over, ApiError)
    assert (over.status, over.code) == (400, "too_many_frames")


def test_a_decoder_that_does_not_start_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def run() -> None:
        pool = DecodePool(processes=1, memory_mib=64, timeout_s=5)
        try:
            job = {"max_frames": 1}
            await pool.sample(b"", job, CARD.preprocessing, param="input")
        finally:
            await pool.close()

    with pytest.raises(ApiError) as caught:
        asyncio.run(run())
    assert (caught.value.status, caught.value.code) == (503, "no_decoder")
    assert caught.value.error_type == "server_error"


# Streams


def make_hub(registry: CollectorRegistry) -> StreamHub:
    settings = ServeSettings(artifact="a", stream_queue=4, max_streams=1, max_stream_decoders=0)
    media: Any = SimpleNamespace(decoders=None)
    return StreamHub(settings, ServedModel(CARD), fake_embed, media, registry)


@pytest.mark.parametrize(("asked", "held"), [(None, 4), (2, 2), (4, 4), (100, 4)])
def test_a_stream_s_queue_is_what_the_client_asks_for_up_to_the_setting(
    asked: int | None, held: int
) -> None:
    messages = played(make_hub(CollectorRegistry()), frames=10, queue=asked)
    assert messages[0]["queue"] == held
    ended = messages[-1]
    assert (ended["type"], ended["received"], ended["dropped"]) == ("ended", 10, 10 - held)
    assert [message["type"] for message in messages[1:-1]] == ["embedding"] * held


def played(hub: StreamHub, *, frames: int, **start: Any) -> list[Any]:
    """A stream whose frames are all there before the first is embedded."""
    messages: list[Any] = []

    async def run() -> None:
        async def send(text: str) -> None:
            messages.append(json.loads(text))
            if messages[-1]["type"] == "embedding":
                stream.acknowledge(messages[-1]["index"])

        stream = Stream(hub, StreamStart(type="start", every=1, **start), send)
        for number in range(frames):
            stream.queue.put(float(number), 0.0, Decoded(pixels(), (SIZE, SIZE)))
        stream.queue.close()
        await stream.run()

    asyncio.run(run())
    return messages


def test_metrics_count_streams_frames_drops_and_refusals() -> None:
    registry = CollectorRegistry()
    hub = make_hub(registry)

    def values() -> dict[str, float | None]:
        names = ("streams", "streams_refused_total", "stream_frames_total")
        names += ("stream_frames_dropped_total", "stream_lag_seconds_count")
        return {name: registry.get_sample_value(f"rayjepa_{name}") for name in names}

    played(hub, frames=10)
    played(hub, frames=3)
    counted = {"stream_frames_total": 13, "stream_frames_dropped_total": 6}
    counted["stream_lag_seconds_count"] = 4 + 3
    assert values() == {"streams": 0, "streams_refused_total": 0} | counted
    with hub.hold():
        with pytest.raises(ApiError) as caught, hub.hold():
            pass
        assert caught.value.code == "too_many_streams"
        with pytest.raises(ApiError), hub.hold_decoder():
            pass
        assert values() == {"streams": 1, "streams_refused_total": 2} | counted
    assert values()["streams"] == 0


def test_streams_end_when_their_model_or_their_replica_goes() -> None:
    hub = make_hub(CollectorRegistry())
    looks = 0

    async def gone(*_: Any) -> Any:
        nonlocal looks
        looks += 1
        raise OtherModel(replace(CARD, name="next", fingerprint="g"))

    hub.embed = gone
    with pytest.raises(ApiError) as changed:
        played(hub, frames=1)
    assert (changed.value.code, close_code(changed.value), looks) == ("model_changed", 1012, LOOKS)
    assert hub.model.named(None).name == "next"  # for the client who connects again

    async def drained() -> None:
        begun = asyncio.Event()

        async def begin() -> None:
            await begun.wait()

        task = asyncio.create_task(hub.drain(begin()))
        waiting = asyncio.create_task(hub.until_drained())
        assert not (await asyncio.wait({waiting}, timeout=0.05))[0]
        begun.set()
        await task
        await waiting

    with pytest.raises(ApiError) as leaving:
        asyncio.run(drained())
    assert (leaving.value.code, close_code(leaving.value)) == ("going_away", 1012)
