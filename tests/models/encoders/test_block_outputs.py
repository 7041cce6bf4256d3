"""Features of every block in one pass, and encoders that end early, against blocks run by hand.

Shape legend: B images or clips, L blocks, D width.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from helpers.models.encoders import PREP, encoder_of, picture, reference
from models.encoders.block_outputs import block_means, first_blocks
from models.encoders.input_batch import InputBatch, encode
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.fit import Fit
from models.media.preprocessing import normalize, prepare

DEPTH = 3


@pytest.mark.parametrize("exclude", [(), ((0.0, 0.0, 0.2, 1.0),)], ids=["everything", "regions"])
@pytest.mark.parametrize("fit", ["squash", "whole"])
def test_features_of_every_block_are_those_of_blocks_run_by_hand(fit: Fit, exclude: tuple) -> None:
    """Pictures of three aspects in one batch, against one at a time in fp64."""
    prep = dataclasses.replace(PREP, fit=fit, exclude=exclude)
    encoder = encoder_of(prep, depth=DEPTH)
    inputs = [prepare(picture(*size), prep) for size in ((60, 100), (90, 70), (64, 64))]
    batch = InputBatch.of(inputs, prep)
    means_BLD = block_means(encoder, batch, prep)
    assert means_BLD.shape == (3, DEPTH, 48)
    for b, one in enumerate(inputs):
        for blocks in range(1, DEPTH + 1):
            expected = reference(encoder, one, prep, blocks).mean(0).float()
            torch.testing.assert_close(means_BLD[b, blocks - 1], expected, atol=1e-5, rtol=1e-5)
    # Blocks differ by much more than that tolerance.
    assert (means_BLD[:, 1:] - means_BLD[:, :-1]).abs().amax(-1).min() > 0.01
    with torch.no_grad():
        assert torch.equal(means_BLD[:, -1], encode(encoder, batch, prep).mean())


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_clips_too(positions: str) -> None:
    encoder, batch = clip_encoder(positions), clips()
    found_BLD = block_means(encoder, batch, PREP)
    with torch.no_grad():
        x = normalize(batch.pixels, PREP.mean, PREP.std)
        x = F.conv3d(x, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, (2, 8, 8))
        x = x.flatten(2).mT
        x = x if encoder.pos_embed is None else x + encoder.pos_embed
        ids = torch.arange(x.shape[1])[None]
        extras = () if encoder.rope is None else (encoder.rope(ids, None),)
        for index, block in enumerate(encoder.blocks):
            x = block(x, *extras)
            expected = F.layer_norm(x, (48,), encoder.norm.weight, encoder.norm.bias, 1e-6)
            torch.testing.assert_close(found_BLD[:, index], expected.mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_an_encoder_of_the_first_blocks_has_their_features(positions: str) -> None:
    encoder, batch = clip_encoder(positions), clips()
    before = torch.get_rng_state()
    means_BLD = block_means(encoder, batch, PREP)
    for count in range(1, DEPTH + 1):
        shallow = first_blocks(encoder, count)
        assert len(shallow.blocks) == count
        assert not any(value.requires_grad for value in shallow.parameters())
        with torch.no_grad():
            mean_BD = encode(shallow, batch, PREP).mean()
        assert torch.equal(mean_BD, means_BLD[:, count - 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_no_hook_stays_whether_or_not_the_pass_succeeds() -> None:
    encoder = clip_encoder("sincos")
    block_means(encoder, clips(), PREP)
    assert not any(block._forward_hooks for block in encoder.blocks)
    with pytest.raises(ValueError, match="expected clips"):
        block_means(encoder, InputBatch(clips().pixels[:, :, :3]), PREP)
    assert not any(block._forward_hooks for block in encoder.blocks)


def clip_encoder(positions: str) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"image_size": (32, 48), "patch_size": 8, "frames": 4, "tubelet": 2}
    encoder = VisionTransformer(
        EncoderShape(**shape, width=48, depth=DEPTH, heads=2, positions=positions)
    )
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return encoder.eval()


def clips() -> InputBatch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 3, 4, 32, 48), dtype=torch.uint8, generator=generator)
    return InputBatch(pixels)
