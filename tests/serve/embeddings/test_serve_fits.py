"""Fits, rectangular inputs and regions left out, through a real server."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from websockets.sync.client import connect

from helpers.models.video_files import write_video
from helpers.repository import ROOT
from helpers.serve.embeddings import data_uri, encoded, picture, save_fitted_artifact
from helpers.serve.videos import LocalServer, local_server
from models.artifacts.artifact import load_artifact, save_artifact
from models.image_size import height_width
from models.media.fit import Fit

PATCH = 8
WIDE = picture(3, (160, 90))
HUD = [0.0, 0.0, 0.3, 0.3]


def uri(image: Image.Image) -> str:
    return data_uri(encoded(image))


def post(server: LocalServer, **body: Any) -> httpx.Response:
    fields = {"normalize": False} | body
    return httpx.post(f"{server.url}/v1/embeddings", json=fields, timeout=60)


def vectors(reply: httpx.Response) -> list[np.ndarray]:
    assert reply.status_code == 200, reply.text
    return [np.array(entry["embedding"]) for entry in reply.json()["data"]]


@torch.inference_mode()
def plain_tokens(folder: Path, pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Tokens [K, D] of the kept patches alone, in plain torch: one picture, no batch, no mask.

    Only for grids that are the encoder's own, so that its positions are looked up.
    """
    artifact = load_artifact(folder)
    encoder, prep = artifact.encoder, artifact.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (prep.mean, prep.std))
    picture_CHW = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std
    patches = torch.nn.functional.unfold(picture_CHW[None], PATCH, stride=PATCH)[0].T
    ids = torch.from_numpy(np.flatnonzero(kept))
    weight = encoder.patch_embed.proj.weight.flatten(1)
    tokens = patches[ids] @ weight.T + encoder.patch_embed.proj.bias
    tokens = (tokens + encoder.pos_embed[0, ids])[None]
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)[0].numpy()


def fitted(fit: Fit, high: int, wide: int) -> np.ndarray:
    """The 16:9 picture on a square input, by Pillow alone."""
    if fit == "squash":
        return np.asarray(WIDE.resize((wide, high), Image.Resampling.BICUBIC))
    if fit == "crop":
        box = ((160 - 90) / 2, 0, (160 + 90) / 2, 90)
        return np.asarray(WIDE.resize((wide, high), Image.Resampling.BICUBIC, box=box))
    inner = round(high * 90 / 160)
    padded = np.full((high, wide, 3), np.round(255 * np.array([0.5, 0.4, 0.3])), np.uint8)
    top = (high - inner) // 2
    resized = WIDE.resize((wide, inner), Image.Resampling.BICUBIC)
    padded[top : top + inner] = np.asarray(resized)
    return padded


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_served_tokens_are_those_of_the_fitted_picture(fit: Fit, tmp_path: Path) -> None:
    folder, everything = save_fitted_artifact(tmp_path / "a", fit, 32), np.ones((4, 4), bool)
    expected = plain_tokens(folder, fitted(fit, 32, 32), everything)
    with local_server(folder) as server:
        reply = post(server, input=[uri(WIDE)], pooling="patches")
        mean = post(server, input=[uri(WIDE)])
        left_out = post(server, input=uri(WIDE), exclude=[[0.0, 0.0, 1.0, 0.4]], pooling="patches")
    np.testing.assert_allclose(vectors(reply)[0], expected, atol=1e-5)
    np.testing.assert_allclose(vectors(mean)[0], expected.mean(0), atol=1e-5)
    assert reply.json()["data"][0]["grid"] == [4, 4]
    assert "kept" not in reply.json()["data"][0]
    (warning,) = reply.json()["warnings"]
    told = {"crop": "44% of it is not seen", "pad": "44% of the input", "squash": "factor of 1.78"}
    assert (warning["code"], warning["items"]) == ("aspects_differ", [0])
    assert told[fit] in warning["message"]
    # Padded, the picture is rows 7 to 25 of 32, and 40% of it touch the first two rows of patches.
    entry = left_out.json()["data"][0]
    top = range(8)
    assert entry["kept"] == [number for number in range(16) if number not in top]
    mask = ~np.isin(np.arange(16), list(top)).reshape(4, 4)
    alone = plain_tokens(folder, fitted(fit, 32, 32), mask)
    np.testing.assert_allclose(vectors(left_out)[0], alone, atol=1e-5)
    assert left_out.json()["usage"]["prompt_tokens"] == len(entry["kept"])
    # Control: tokens chosen after the encoder has seen everything are others.
    assert np.abs(alone - expected[mask.reshape(-1)]).max() > 1e-2


def test_a_whole_picture_has_a_grid_of_its_own(tmp_path: Path) -> None:
    """The features that evaluation computes of the same file; one forward for several grids."""
    import pyarrow as pa

    from pipelines.evaluation.features import extract_features

    folder = save_fitted_artifact(tmp_path / "a", "whole", (32, 64))
    artifact = load_artifact(folder)
    pictures = [WIDE, picture(4, (60, 120)), picture(5, (64, 32))]
    files = [encoded(image) for image in pictures]
    prep = dataclasses.replace(artifact.preprocessing, exclude=(tuple(HUD),))
    for exclude, used in (([], artifact.preprocessing), ([HUD], prep)):
        rows = pa.table({"image": files})
        mean = extract_features(artifact.encoder.eval(), used, rows)
        with local_server(folder, max_wait_ms=200) as server:
            served = post(server, input=[uri(image) for image in pictures], exclude=exclude)
            tokens = post(server, input=uri(WIDE), exclude=exclude, pooling="patches")
            assert server.batches is not None
            assert server.batches[0] == 3
        np.testing.assert_allclose(vectors(served), mean, atol=1e-5)
        assert "warnings" not in served.json()
        entry = tokens.json()["data"][0]
        rows_columns = entry["grid"]
        assert rows_columns[0] * rows_columns[1] <= 32
        assert rows_columns[1] / rows_columns[0] == pytest.approx(16 / 9, rel=0.25)
        assert len(entry["embedding"]) == len(entry.get("kept", range(np.prod(rows_columns))))
        assert ("kept" in entry) == bool(exclude)


def test_requests_with_other_regions_share_one_forward(tmp_path: Path) -> None:
    """An artifact with regions of its own, a request that replaces them, and one without any."""
    folder = save_fitted_artifact(tmp_path / "a", "squash", (16, 32), exclude=(tuple(HUD),))
    pixels = np.asarray(WIDE.resize((32, 16), Image.Resampling.BICUBIC))
    whole = np.ones((2, 4), bool)
    own, other = whole.copy(), whole.copy()
    own[0, :2], other[:, 3] = False, False
    bodies = [{}, {"exclude": []}, {"exclude": [[0.75, 0.0, 1.0, 1.0]]}, {"exclude": None}]
    with local_server(folder) as server:
        served = [vectors(post(server, input=uri(WIDE), **body))[0] for body in bodies]
        model = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    for vector, mask in zip(served, (own, whole, other, own), strict=True):
        np.testing.assert_allclose(vector, plain_tokens(folder, pixels, mask).mean(0), atol=1e-5)
    assert (model["image_size"], model["grid"], model["fit"]) == ([16, 32], [2, 4], "squash")
    assert model["exclude"] == [HUD]
    from serve.embeddings.media.inputs import to_input
    from serve.embeddings.replica.embedder import Encoder
    from serve.embeddings.settings import ServeSettings

    encoder, forwards = Encoder(ServeSettings(artifact=str(folder), threads=1)), []
    encoder._encoder.norm.register_forward_hook(lambda *_: forwards.append(1))
    items: list[Any] = []
    for exclude in ((tuple(HUD),), (), ((0.75, 0.0, 1.0, 1.0),)):
        prep = dataclasses.replace(encoder.preprocessing, exclude=exclude)
        items.append((to_input(encoded(WIDE), prep, max_pixels=10**6, param="a").input, "mean"))
    for together, expected in zip(encoder.run(items), served[:3], strict=True):
        np.testing.assert_allclose(together, expected, atol=1e-5)
    assert len(forwards) == 1


@pytest.mark.parametrize(
    ("exclude", "param"),
    [
        ([[0.5, 0.0, 0.4, 1.0]], "exclude.0"),
        ([HUD, [0.0, 0.0, 1.0, 1.1]], "exclude.1"),
        ([[0.0, 0.0, 1.0]], "exclude.0"),
        ([["0", 0.0, 1.0, 1.0]], "exclude.0.0"),
        ("hud", "exclude"),
        ([HUD] * 65, "exclude"),
        ([[0, 0, 1, 1]], "exclude"),
    ],
)
def test_wrong_regions_are_typed_errors(exclude: Any, param: str, server: LocalServer) -> None:
    error = post(server, input=uri(WIDE), exclude=exclude).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", param)
    with connect(f"ws://127.0.0.1:{server.port}/v1/streams") as socket:
        socket.send(json.dumps({"type": "start", "exclude": exclude}))
        message = json.loads(socket.recv())
        if message["type"] == "started":  # only a picture shows that nothing of it is left
            socket.send(encoded(WIDE))
            message = json.loads(socket.recv())
    assert (message["type"], message["error"]["param"]) == ("error", param)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with local_server(
        save_fitted_artifact(tmp_path_factory.mktemp("fits") / "a", "whole", 32)
    ) as running:
        yield running


def test_a_video_and_a_stream_have_the_grid_of_their_frames(server: LocalServer) -> None:
    size = (48, 96)
    raw = write_video(io.BytesIO(), 4, codec="mpeg4", container="matroska", size=size).getvalue()
    item = {"video": data_uri(raw, "video/x-matroska")}
    body = {"input": item, "exclude": [HUD], "pooling": "patches"}
    entry = post(server, **body).json()["data"][0]
    columns_per_row = entry["grid"][1] / entry["grid"][0]
    assert columns_per_row == pytest.approx(2, rel=0.25)
    start = {"type": "start", "source": "container", "exclude": [HUD], "pooling": "patches"}
    with connect(f"ws://127.0.0.1:{server.port}/v1/streams") as socket:
        socket.send(json.dumps(start | {"normalize": False}))
        socket.send(raw)
        socket.send(json.dumps({"type": "end"}))
        messages = [json.loads(socket.recv()) for _ in range(3)]
    assert (messages[1]["grid"], messages[1]["kept"]) == (entry["grid"], entry["kept"])
    count = len(entry["kept"])
    first = np.array(entry["embedding"])[:count]
    np.testing.assert_allclose(messages[1]["embedding"], first, atol=1e-5)


def test_the_documented_client_of_a_stream_leaves_the_hud_out(
    server: LocalServer, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "live_streams.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(picture(number, (160, 90))))
    client = script.replace("localhost:8000", f"127.0.0.1:{server.port}")
    done = subprocess.run(
        [sys.executable, "-c", client, *map(str, paths)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    # On 3 x 5 patches the regions touch the first row and two patches of the last.
    assert [line.split(" ", 1)[1] for line in lines] == [
        "[3, 5] [8, 32] [5, 6, 7, 8, 9, 12, 13, 14]"
    ] * 3


def test_a_stream_says_once_how_frames_are_fitted(tmp_path: Path) -> None:
    folder = save_fitted_artifact(tmp_path / "a", "crop", 32)
    with (
        local_server(folder) as server,
        connect(f"ws://127.0.0.1:{server.port}/v1/streams") as socket,
    ):
        socket.send(json.dumps({"type": "start"}))
        for image in (picture(1, (64, 64)), WIDE, WIDE):
            socket.send(encoded(image))
        socket.send(json.dumps({"type": "end"}))
        messages = [json.loads(socket.recv()) for _ in range(5)]
        registry = server.parts.metrics.registry
        post(server, input=[uri(WIDE), uri(picture(1, (64, 64))), uri(WIDE)])
        assert registry.get_sample_value("rayjepa_stream_aspects_differ_total") == 1
        assert registry.get_sample_value("rayjepa_aspects_differ_total") == 2
    warned = ["warnings" in message for message in messages]
    assert warned == [False, False, True, False, False]
    assert "44% of it is not seen" in messages[2]["warnings"][0]["message"]


def test_a_stream_whose_grid_changes_begins_a_new_window(tmp_path: Path) -> None:
    from helpers.serve.videos import save_clip_artifact

    save_clip_artifact(tmp_path / "square")
    artifact = load_artifact(tmp_path / "square")
    prep = dataclasses.replace(artifact.preprocessing, fit="whole")
    provenance = {"run": "test", "step": 0, "manifest_hash": ""}
    save_artifact(tmp_path / "whole", artifact.encoder, prep, provenance)
    assert height_width(prep.image_size) == (32, 32)
    with (
        local_server(tmp_path / "whole") as server,
        connect(f"ws://127.0.0.1:{server.port}/v1/streams") as socket,
    ):
        socket.send(json.dumps({"type": "start", "every": 4, "pooling": "patches"}))
        for size in ((64, 64), (64, 64), (96, 48), (96, 48), (96, 48), (96, 48)):
            socket.send(encoded(picture(1, size)))
        socket.send(json.dumps({"type": "end"}))
        _, first, second, ended = [json.loads(socket.recv()) for _ in range(4)]
    assert (first["first_frame"], first["last_frame"], first["grid"]) == (0, 1, [4, 4])
    assert (second["first_frame"], second["last_frame"]) == (2, 5)
    assert second["grid"][1] > second["grid"][0]
    assert ended["type"] == "ended"
