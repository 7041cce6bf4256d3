"""What an encoder takes of pictures under every fit, and the tokens of batches that mix them.

Shape legend: B pictures, N tokens of a grid, K tokens that are kept, P pixel values, D width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.models.encoders import PREP, encoder_of, picture, reference
from models.encoders.input_batch import InputBatch, encode
from models.media.fit import Fit
from models.media.preprocessing import (
    EncoderInput,
    input_layout,
    normalize,
    prepare,
)

LEFT = (0.0, 0.0, 0.2, 1.0)
CORNER = (0.7, 0.7, 0.8, 0.8)


@pytest.mark.parametrize("exclude", [(), (LEFT, CORNER)], ids=["everything", "regions"])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "whole"])
def test_tokens_are_those_of_the_kept_patches_alone(fit: Fit, exclude: tuple) -> None:
    """Pictures of three aspects in one batch, against one at a time in fp64."""
    prep = dataclasses.replace(PREP, fit=fit, exclude=exclude)
    encoder = encoder_of(prep)
    inputs = [prepare(picture(*size), prep) for size in ((60, 100), (90, 70), (64, 64))]
    with torch.inference_mode():
        encoded = encode(encoder, InputBatch.of(inputs, prep), prep)
    for b, one in enumerate(inputs):
        expected = reference(encoder, one, prep)
        found = encoded.each()[b]
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
        mean = encoded.mean()[b].double()
        torch.testing.assert_close(mean, expected.mean(0), atol=1e-5, rtol=1e-5)
        placed = encoded.in_grid()[b]
        there = torch.isfinite(placed[:, 0])
        assert torch.equal(placed[there], found)
        kept = np.ones((4, 6), np.bool_) if one.kept is None else one.kept
        assert there[: kept.size].tolist() == kept.reshape(-1).tolist()
        assert not there[kept.size :].any()
    if exclude:
        assert all(one.kept is not None and not one.kept.all() for one in inputs)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "whole"])
def test_pixels_inside_a_region_change_nothing_and_others_do(fit: Fit) -> None:
    prep = dataclasses.replace(PREP, fit=fit, exclude=(LEFT,))
    encoder, before = encoder_of(prep), np.array(picture(60, 100))
    # The share of the patches that touch the region; the bicubic kernel reaches a little beyond.
    inside, outside = before.copy(), before.copy()
    inside[:, :14] = 255 - inside[:, :14]
    outside[20:40, 60:80] = 255 - outside[20:40, 60:80]
    inputs = [prepare(Image.fromarray(x), prep) for x in (before, inside, outside)]
    with torch.inference_mode():
        same, hidden, seen = encode(encoder, InputBatch.of(inputs, prep), prep).mean()
        free = dataclasses.replace(prep, exclude=())
        inputs = [prepare(Image.fromarray(x), free) for x in (before, inside)]
        without = encode(encoder, InputBatch.of(inputs, free), free).mean()
    torch.testing.assert_close(hidden, same, atol=1e-6, rtol=0)
    assert (seen - same).abs().max() > 1e-2
    if fit != "crop":  # of which the left edge is cut off anyway
        assert (without[0] - without[1]).abs().max() > 1e-2


def test_without_regions_on_one_grid_the_encoder_is_called_as_ever() -> None:
    for fit in ("crop", "pad", "squash"):
        prep = dataclasses.replace(PREP, fit=fit)
        encoder = encoder_of(prep)
        batch = InputBatch.of([prepare(picture(60, 100), prep)] * 2, prep)
        assert batch.kept_BM is None
        with torch.inference_mode():
            tokens = encoder(normalize(batch.pixels, prep.mean, prep.std))
            encoded = encode(encoder, batch, prep)
            assert torch.equal(encoded.in_grid(), tokens)
            assert torch.equal(encoded.mean(), tokens.mean(1))


def test_clips_of_other_grids_are_encoded_as_alone() -> None:
    """Time steps of a strip are longer than those of the clip's own grid."""
    prep = dataclasses.replace(PREP, fit="whole", exclude=(CORNER,))
    encoder = encoder_of(prep, frames=4, tubelet=2)
    inputs = []
    for seed, size in enumerate(((60, 100), (90, 70))):
        frames = [prepare(picture(*size, seed=10 * seed + t), prep) for t in range(4)]
        inputs.append(EncoderInput(np.stack([f.pixels for f in frames]), frames[0].kept))
    shapes = [one.kept.shape for one in inputs if one.kept is not None]
    assert shapes[1] not in (shapes[0], (4, 6))
    with torch.inference_mode():
        both = encode(encoder, InputBatch.of(inputs, prep), prep).each()
        for one, found in zip(inputs, both, strict=True):
            assert one.kept is not None
            rows, columns = one.kept.shape
            pixels = torch.from_numpy(one.pixels).permute(3, 0, 1, 2)[None]
            patches = encoder.patch_embed.patchify(normalize(pixels, prep.mean, prep.std))
            own = np.flatnonzero(np.tile(one.kept.reshape(-1), 2))
            step, place = np.divmod(own, rows * columns)
            ids = torch.from_numpy(step * 24 + place)[None]
            grids = torch.tensor([[rows, columns]])
            alone = encoder.forward_tokens(patches[:, own], ids, grids)
            torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=1e-5)


def test_batches_are_joined_divided_and_put_together_again() -> None:
    prep = dataclasses.replace(PREP, fit="whole")
    inputs = [prepare(picture(*size), prep) for size in ((60, 100), (90, 70), (64, 64))]
    batch = InputBatch.of(inputs, prep)
    assert batch.pixels.shape == (3, 3, 8, 8 * 24)
    again = InputBatch.join(batch.split(2))
    assert torch.equal(again.pixels, batch.pixels)
    for one, found in zip(inputs, again.pictures(), strict=True):
        assert np.array_equal(found.permute(1, 2, 0).numpy(), one.pixels)


def test_regions_that_leave_nothing_are_named() -> None:
    prep = dataclasses.replace(PREP, exclude=((0.0, 0.0, 1.0, 0.99),))
    with pytest.raises(ValueError, match="leave nothing of a picture of 100x60"):
        input_layout(60, 100, prep)
