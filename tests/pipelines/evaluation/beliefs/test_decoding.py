"""Decoders of frozen tokens, and the figures: what tokens tell, and controls at chance.

Shape legend: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from helpers.models.beliefs import GREY
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from models.objectives.objective import Objective
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.evaluation.beliefs.study import PASSES, Study, check_subject, study
from pipelines.evaluation.subject import Subject
from pipelines.runs.checkpoints import new_objective

SIZE, STEPS, TRAIN, TEST = 16, 40, 256, 100
PREP = Preprocessing(image_size=SIZE, patch_size=4, **GREY)


def run() -> tuple[Objective, PretrainConfig]:
    model = ModelConfig(encoder="vit_micro32", image_size=SIZE, patch_size=4, **GREY)
    cfg = PretrainConfig(model=model)
    torch.manual_seed(0)
    return new_objective(cfg), cfg


def subject(**changes: object) -> Subject:
    objective, cfg = run()
    encoder = objective.feature_encoder
    assert isinstance(encoder, VisionTransformer)
    made = Subject(encoder, PREP, {"run": "r"}, config=cfg, objective=objective)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def smooth(count: int, seed: int) -> torch.Tensor:
    """Pictures of a few colours, so that a decoder has something to say in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 2, 2, generator=generator)
    large = torch.nn.functional.interpolate(small, SIZE, mode="bilinear")
    return (255 * large).to(torch.uint8)


@pytest.fixture(scope="module")
def found() -> Iterator[Study]:
    steps = iter(range(10**6))
    yield study(
        subject(),
        smooth(TRAIN, 0),
        smooth(TEST, 1),
        steps=STEPS,
        seed=0,
        advance=lambda: next(steps),
    )
    assert next(steps) == PASSES * STEPS


def test_tokens_tell_their_picture_and_those_of_another_do_not(found: Study) -> None:
    for row in found.results["rows"].values():
        ranks = row["mrr"]
        assert ranks["all_tokens"] > 5 * ranks["chance"]
        assert ranks["shuffled"] < 3 * ranks["chance"]
        assert ranks["hidden_mean_picture"] < 2 * ranks["chance"]
        assert ranks["hidden_shuffled"] < 3 * ranks["chance"]
        assert ranks["hidden_true"] > ranks["hidden_mean_picture"]
        assert row["error"]["hidden_true"] < row["error"]["hidden_mean_picture"]


def test_every_panel_shows_the_same_samples_and_only_hidden_regions_differ(found: Study) -> None:
    titles = [panel.title for panel in found.panels]
    assert titles == [
        *("sample", "what is seen", "expected"),
        *("possible 1", "possible 2", "possible 3", "nearest", "true tokens"),
    ]
    pixels = {panel.title: panel.pixels for panel in found.panels}
    sample = pixels["sample"]
    assert torch.equal(sample, smooth(TEST, 1)[: len(sample)])
    # Context tokens are shown as they are; in all drawn panels so is everything not hidden.
    seen = (pixels["what is seen"] == sample).all(1)
    for title in titles[2:]:
        assert (pixels[title] == sample).all(1)[seen].all(), title
        assert not torch.equal(pixels[title], sample), title
    assert not torch.equal(pixels["possible 1"], pixels["possible 2"])


def test_maps_of_surprise_are_of_the_shown_samples(found: Study) -> None:
    assert found.maps_BN.shape == (8, 16)
    assert found.maps_BN.isfinite().all()
    assert found.whole_B[4:].tolist() == sorted(found.whole_B[4:].tolist(), reverse=True)
    assert "cuts" not in found.results


def test_what_cannot_be_drawn_is_refused_by_its_flag() -> None:
    with pytest.raises(ValueError, match="--checkpoint: r is an encoder alone"):
        check_subject(subject(objective=None))
    whole = dataclasses.replace(PREP, fit="whole")
    with pytest.raises(ValueError, match="--decode-steps: fit whole: samples may lack tokens"):
        check_subject(subject(preprocessing=whole), "--decode-steps")
    left_out = dataclasses.replace(PREP, exclude=((0.0, 0.0, 1.0, 0.2),))
    with pytest.raises(ValueError, match="--checkpoint: --exclude: samples may lack tokens"):
        check_subject(subject(preprocessing=left_out))
