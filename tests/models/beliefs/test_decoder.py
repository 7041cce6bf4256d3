"""Decoders learn what tokens say where there are tokens, and samples of a flow end at pictures.

Shape legend: M pictures, N tokens of a picture, P pixel values per token, D width.
"""

from __future__ import annotations

import pytest
import torch

from helpers.models.beliefs import CLIPS, IMAGES, random_pixels
from models.beliefs.decoder import Decoder, FlowDecoder, flow_loss, regression_loss
from models.beliefs.pixels import by_picture, by_sample, to_bytes, to_values, unpatchify
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.image_size import Grid

GRID, D, P = Grid(2, 2), 8, 12
SIZES = {"grid": GRID, "token_width": D, "patch_values": P, "width": 32, "depth": 1, "heads": 2}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [IMAGES, CLIPS])
def test_pixels_come_back_from_their_patches(shape: EncoderShape) -> None:
    encoder, pixels = VisionTransformer(shape), random_pixels(shape, 3)
    values_BNP = to_values(encoder.patch_embed.patchify(pixels))
    assert values_BNP.min() >= -1
    assert values_BNP.max() <= 1
    again_BNP = by_sample(by_picture(values_BNP, encoder), encoder)
    assert torch.equal(to_bytes(unpatchify(again_BNP, encoder)), pixels)
    assert by_picture(values_BNP, encoder).shape[1] == shape.grid.per_step


def test_regression_learns_what_tokens_say_and_only_where_there_are_some() -> None:
    torch.manual_seed(0)
    decoder = Decoder(**SIZES)
    tokens_MND, weight_DP = random(256, 4, D), random(D, P, seed=1) / D**0.5
    pixels_MNP = tokens_MND @ weight_DP
    there_MN = torch.rand(256, 4, generator=torch.Generator().manual_seed(2)) < 0.7
    there_MN[:, 0] = True
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        loss = regression_loss(decoder, tokens_MND, there_MN, pixels_MNP)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = regression_loss(decoder, tokens_MND, there_MN, pixels_MNP)
        shuffled = regression_loss(decoder, tokens_MND.roll(1, 0), there_MN, pixels_MNP)
        # What stands where there is no token is not read.
        noise_MND = torch.where(there_MN[..., None], tokens_MND, 99.0)
        assert torch.equal(decoder(noise_MND, there_MN), decoder(tokens_MND, there_MN))
    assert learned < 0.1 < 1 < shuffled


def test_a_sample_ends_at_the_picture_that_is_expected_of_it() -> None:
    class Known(FlowDecoder):
        """Knows the picture; the steps must lead there from any noise."""

        def denoise(self, noisy_MNP, time_M, tokens_MND, there_MN):
            return picture_MNP.expand_as(noisy_MNP)

    picture_MNP = random(3, 4, P)
    there_MN = torch.ones(3, 4, dtype=torch.bool)
    drawn = Known(**SIZES).sample(
        torch.zeros(3, 4, D), there_MN, torch.Generator().manual_seed(1), steps=5
    )
    torch.testing.assert_close(drawn, picture_MNP, atol=1e-5, rtol=1e-5)


def test_a_flow_draws_either_of_two_pictures_and_not_their_mean() -> None:
    """The token does not say which of two it is: a sample is one of them, regression the mean."""
    torch.manual_seed(0)
    flow, regression = FlowDecoder(**SIZES), Decoder(**SIZES)
    sign_M11 = random(512, 1, 1, seed=3).sign()
    pixels_MNP = sign_M11.expand(512, 4, P).contiguous()
    tokens_MND, there_MN = torch.zeros(512, 4, D), torch.ones(512, 4, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    parts = [*flow.parameters(), *regression.parameters()]
    optimizer = torch.optim.AdamW(parts, lr=3e-3)
    for _ in range(200):
        rows = torch.randint(512, (128,), generator=generator)
        batch = tokens_MND[rows], there_MN[rows], pixels_MNP[rows]
        optimizer.zero_grad()
        (flow_loss(flow, *batch, generator) + regression_loss(regression, *batch)).backward()
        optimizer.step()
    drawn_MNP = flow.sample(tokens_MND[:200], there_MN[:200], generator)
    means_M = drawn_MNP.mean((1, 2))
    assert (means_M.abs() > 0.6).float().mean() > 0.8
    assert 0.25 < (means_M > 0).float().mean() < 0.75
    with torch.no_grad():
        assert regression(tokens_MND[:1], there_MN[:1]).abs().mean() < 0.3
