"""`pooling: surprise` of pictures, videos and streams, and its refusals, through a real server.

Shape legend: S time steps, N patches, T frames.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from websockets.sync.client import connect

from helpers.models.beliefs import CLIPS, GREY, HALVES, objective, patches_of, random_pixels
from helpers.models.video_files import write_video
from helpers.serve.embeddings import data_uri, encoded, picture, png_uri
from helpers.serve.videos import LocalServer, local_server
from models.artifacts.artifact import save_artifact
from models.beliefs.expectation import Expectation, Surprise
from models.beliefs.stored import save_surprise
from models.media.images import decode_image
from models.media.preprocessing import Preprocessing, eval_transform

PREP = Preprocessing(image_size=16, **GREY)
PROVENANCE = {"run": "r", "step": 1, "manifest_hash": ""}
PNGS = [encoded(picture(seed)) for seed in range(6)]
VIDEO = data_uri(write_video(io.BytesIO(), 8, rate=8, container="mp4").getvalue(), "video/mp4")


@pytest.fixture(scope="module")
def surprise() -> Surprise:
    found = Expectation.of(objective(CLIPS))
    measure = Surprise(found, HALVES)
    measure.calibrate([patches_of(found, random_pixels(CLIPS, 6))])
    return measure


@pytest.fixture(scope="module")
def server(surprise: Surprise, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("artifact") / "surprised"
    add = functools.partial(save_surprise, surprise=surprise)
    save_artifact(folder, surprise.expectation.target_encoder, PREP, PROVENANCE, add=add)
    with local_server(folder) as running:
        yield running


def post(server: LocalServer, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)


def direct(surprise: Surprise, pngs: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The map [S, N] and the surprise of each step [S] of four frames."""
    frames = [eval_transform(decode_image(png), PREP) for png in pngs]
    pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None]
    errors = surprise.errors(patches_of(surprise.expectation, pixels))
    return surprise.map(errors)[0].reshape(2, 4).numpy(), surprise.by_step(errors)[0].numpy()


def test_a_picture_is_a_clip_that_stands_still(server: LocalServer, surprise: Surprise) -> None:
    (entry,) = post(server, input=png_uri(0), pooling="surprise").json()["data"]
    map_SN, steps_S = direct(surprise, [PNGS[0]] * 4)
    assert (entry["shape"], entry["grid"]) == ([1, 4], [2, 2])
    np.testing.assert_allclose(entry["embedding"], map_SN[:1], rtol=1e-4)
    np.testing.assert_allclose(entry["surprise"], steps_S[:1], rtol=1e-4)
    assert np.abs(map_SN[0] - map_SN[0, 0]).max() > 1e-3


def test_a_video_has_surprise_for_every_step_and_shares_batches(
    server: LocalServer, surprise: Surprise
) -> None:
    reply = post(server, input={"video": VIDEO, "fps": 8}, pooling="surprise").json()
    (entry,) = reply["data"]
    assert (entry["shape"], len(entry["surprise"])) == ([4, 4], 4)  # two clips of two steps
    body = {"input": {"video": VIDEO}, "pooling": "surprise", "encoding_format": "base64"}
    (packed,) = post(server, **body).json()["data"]
    values = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4").reshape(packed["shape"])
    assert values.shape == (2, 4)
    (plain,) = post(server, input={"video": VIDEO}, pooling="surprise").json()["data"]
    np.testing.assert_allclose(values, plain["embedding"], rtol=1e-4)
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["surprise"] is True


def test_streams_are_told_their_surprise_by_step(server: LocalServer, surprise: Surprise) -> None:
    with connect(f"ws://127.0.0.1:{server.port}/v1/streams") as socket:
        socket.send(json.dumps({"type": "start", "pooling": "surprise", "every": 2}))
        for png in PNGS:
            socket.send(png)
        socket.send(json.dumps({"type": "end"}))
        messages = [json.loads(socket.recv(timeout=30)) for _ in range(3)]
    told = [message for message in messages if message["type"] == "embedding"]
    assert [message["last_frame"] for message in told] == [3, 5]
    for message in told:
        map_SN, steps_S = direct(surprise, PNGS[message["first_frame"] :][:4])
        np.testing.assert_allclose(message["embedding"], map_SN, rtol=1e-4)
        np.testing.assert_allclose(message["surprise"], steps_S, rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dimensions", 4, "one number for each token"),
        ("exclude", [[0, 0, 0.5, 0.5]], "the whole picture"),
    ],
)
def test_what_surprise_cannot_be_combined_with_is_a_400(
    server: LocalServer, field: str, value: object, words: str
) -> None:
    reply = post(server, input=png_uri(0), pooling="surprise", **{field: value})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_value", field)
    assert words in error["message"]


def test_a_model_without_its_predictor_says_so(artifact: Path) -> None:
    with local_server(artifact) as plain:
        reply = post(plain, input=png_uri(0), pooling="surprise")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "pooling")
        assert "--surprise own or future" in reply.json()["error"]["message"]
        with connect(f"ws://127.0.0.1:{plain.port}/v1/streams") as socket:
            socket.send(json.dumps({"type": "start", "pooling": "surprise"}))
            refused = json.loads(socket.recv(timeout=30))
        assert refused["type"] == "error"
        assert refused["error"]["param"] == "pooling"
        assert httpx.get(f"{plain.url}/v1/models").json()["data"][0]["surprise"] is False
