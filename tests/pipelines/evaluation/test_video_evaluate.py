"""Features, probes and report of clips, on made-up videos whose class is how they change.

B clips, F frames, D features.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from helpers.pipelines.evaluation import CLIP_SHAPE
from models.encoders.input_batch import InputBatch
from models.encoders.vit import build_encoder
from models.image_size import Grid
from models.media.preprocessing import Preprocessing, normalize
from models.media.videos import decode_frames
from pipelines.config.data import ClipConfig
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.rows import load_labelled
from pipelines.evaluate import evaluate
from pipelines.evaluation.features import (
    decode_all,
    encoder_features,
    pixel_features,
    single_frame,
    tubelet_features,
)
from pipelines.evaluation.probe_sets import probe_set
from pipelines.evaluation.report.figures import masked_clip, pca_pictures, picture_uri
from pipelines.evaluation.subject import load_subject, with_sampler
from pipelines.loading.clips import ClipSampler

PREP = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
LARGE = dataclasses.replace(PREP, image_size=64)
Evaluated = tuple[dict, Path, str]
"""Results, their folder, and what was printed."""
SAMPLER = ClipSampler(frames=4, settings=ClipConfig(stride=2))


def encoder_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_encoder("video_micro", **CLIP_SHAPE)


# --- features


def test_decoded_clips_are_the_middle_of_each_segment(sets: tuple[str, str]) -> None:
    table = load_labelled(sets[1], 5)
    clips_BCFHW = decode_all(table, PREP, SAMPLER).pixels
    assert clips_BCFHW.shape == (5, 3, 4, 32, 32)
    for row, clip_CFHW in zip(table.to_pylist(), clips_BCFHW, strict=True):
        (numbers,) = SAMPLER.middle([row["num_frames"]], [row["fps"]])
        frames = decode_frames(row["video"], numbers.tolist())
        # A 64 x 48 frame: the short side to 32 pixels, the middle 48 x 48 of it.
        expected = Image.fromarray(frames[2]).resize((32, 32), Image.BICUBIC, box=(8, 0, 56, 48))
        assert (clip_CFHW[:, 2].permute(1, 2, 0).numpy() == np.asarray(expected)).all()


def test_features_of_clips_are_the_encoders_own(sets: tuple[str, str]) -> None:
    encoder, table = encoder_of(0), load_labelled(sets[1])
    clips = decode_all(table, PREP, SAMPLER).pixels
    with torch.no_grad():
        tokens = encoder(normalize(clips, PREP.mean, PREP.std))
    features = {"encoder": encoder_features(encoder, PREP, pooling="patches")}
    found = probe_set(sets[1], features, PREP, batch_size=20, sampler=SAMPLER)
    assert found.tokens["encoder"].dtype == np.float16
    np.testing.assert_allclose(found.tokens["encoder"], tokens.numpy(), atol=4e-3)
    np.testing.assert_allclose(found.features["encoder"], tokens.mean(1).numpy(), atol=2e-3)


def test_a_single_frame_says_nothing_of_the_other_frames() -> None:
    encoder = encoder_of(0)
    moving = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    features = encoder_features(encoder, PREP)
    still = single_frame(features)
    other = moving.clone()
    other[:, :, [0, 1, 3]] = 0  # all but the middle one
    with torch.inference_mode():
        stilled = still(InputBatch(moving))
        assert torch.equal(stilled, still(InputBatch(other)))
        assert not torch.allclose(stilled, features(InputBatch(moving)), atol=1e-2)
        stands = moving[:, :, 2:3].expand_as(moving)
        assert torch.equal(stilled, features(InputBatch(stands)))


def test_raw_pixels_of_clips_are_bounded_and_tubelets_know_their_place() -> None:
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    assert pixel_features(PREP)(InputBatch(clips)).shape == (2, 3 * 4 * 32 * 32)
    large = torch.randint(0, 256, (1, 3, 16, 64, 64), dtype=torch.uint8)
    assert pixel_features(LARGE)(InputBatch(large)).shape == (1, 3 * 16 * 16 * 16)
    tokens = tubelet_features(encoder_of(0), PREP)(InputBatch(clips))
    assert tokens.shape == (2, 2 * 4 * 4, 3 * 2 * 8 * 8 + 96)
    patch = normalize(clips, PREP.mean, PREP.std)[0, :, 2:4, 8:16, 24:32]  # time 1, row 1, column 3
    assert torch.equal(tokens[0, 16 + 4 + 3, :-96], patch.flatten())
    assert len({tuple(t.tolist()) for t in tokens[0, :, -96:]}) == 32


# --- the job


@pytest.fixture(scope="module")
def evaluation(
    sets: tuple[str, str], checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Evaluated:
    out, printed = tmp_path_factory.mktemp("evaluation"), io.StringIO()
    cfg = EvaluateConfig(
        checkpoint=checkpoint,
        data=sets[0],
        test=sets[1],
        out=str(out),
        probe_epochs=2,
        attentive_epochs=1,
        knn_k=3,
    )
    return evaluate(cfg, console=Console(file=printed, width=200)), out, printed.getvalue()


def test_what_the_crop_does_not_show_is_said_once(evaluation: Evaluated) -> None:
    (line,) = [line for line in evaluation[2].splitlines() if line.startswith("note: ")]
    assert line.startswith("note: --data, --test: the pictures have another aspect")
    assert "one 64 wide and 48 high (4:3) is cropped: 25% of it is not seen" in line


def test_results_hold_every_number_beside_three_baselines(
    evaluation: Evaluated,
) -> None:
    results, out, _ = evaluation
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["rows"]) == ["encoder", "random_init", "single_frame", "raw_pixels"]
    still = results["rows"]["single_frame"]
    read = max(still["knn"], still["linear"]["accuracy"], still["attentive"]["accuracy"])
    assert results["task"]["single_frame"] == read
    for row in results["rows"].values():
        for value in (row["knn"], row["linear"]["accuracy"], row["attentive"]["accuracy"]):
            assert 0 <= value <= 1
        assert row["attentive"]["lr"] in (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
    assert results["data"]["test"]["videos"] == 12


def test_the_report_shows_clips_in_motion(evaluation: Evaluated) -> None:
    html = (evaluation[1] / "report.html").read_text()
    sources = re.findall(r'<img src="data:image/(\w+);base64,', html)
    assert len(sources) >= 3 * 7 + 8 * 3 + 8 * 3  # neighbours, PCA, masks
    assert set(sources) == {"gif"}
    assert not re.search(r"@import|url\(|<script|<link", html)
    for text in ("Attentive probe", "Single frame", "Raw pixels", "points over single frame"):
        assert text in html


def test_flags_decide_which_frames_and_cannot_contradict(
    sets: tuple[str, str], checkpoint: str, tmp_path: Path
) -> None:
    cfg = EvaluateConfig(checkpoint=checkpoint, data=sets[0], test=sets[1], out=str(tmp_path))
    subject = load_subject(checkpoint)
    assert with_sampler(cfg, subject, "video").sampler == SAMPLER
    slower = with_sampler(dataclasses.replace(cfg, fps=2.0), subject, "video").sampler
    assert slower is not None
    assert slower.settings == ClipConfig(fps=2.0)
    assert with_sampler(cfg, subject, "image").sampler is None
    with pytest.raises(ValueError, match="--stride"):
        with_sampler(dataclasses.replace(cfg, fps=2.0, stride=2), subject, "video")


# --- pictures


def test_a_clip_becomes_an_animation_with_all_its_frames() -> None:
    frames = np.stack([np.full((40, 40, 3), 30 * f, np.uint8) for f in range(5)])
    uri = picture_uri(frames)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (image.format, image.n_frames, image.size) == ("GIF", 5, (40, 40))
    assert picture_uri(frames[0]).startswith("data:image/png")


def test_masked_clips_show_the_context_in_its_time() -> None:
    clip = np.full((4, 32, 32, 3), 200, np.uint8)
    picture = masked_clip(clip, np.array([0]), np.array([16]), grid=Grid(4, 4), tubelet=2)
    assert (picture[:2, :8, :8] == 200).all()  # context: the first two frames of the first patch
    assert (picture[2:, :8, :8] == picture[2, 0, 0]).all()
    tinted, faded = picture[2, 0, 0], picture[0, 20, 20]
    assert tinted[0] != tinted[2]
    assert faded[0] == faded[2] != 200
    assert (picture[:2, 8:] == faded).all()


def test_pca_pictures_of_clips_have_a_time_axis() -> None:
    tokens = np.random.default_rng(0).standard_normal((6, 2 * 16, 10)).astype(np.float32)
    pictures = pca_pictures(tokens, 3, Grid(4, 4, 2))
    assert pictures.shape == (3, 2, 4, 4, 3)
    flat = pca_pictures(tokens, 3, Grid(2, 2, 8))  # 8 steps of 2 x 2
    assert (flat.reshape(3, 32, 3) == pictures.reshape(3, 32, 3)).all()  # time varies slowest
