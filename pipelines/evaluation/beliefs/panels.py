"""Pictures of what a predictor expects behind a mask, side by side.

Shape suffixes: B samples, N tokens of a sample, T hidden tokens, P pixel values per token, D width,
S time steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.beliefs.expectation import Mask
from models.beliefs.pixels import to_bytes, unpatchify
from pipelines.evaluation.beliefs.figures import Scene
from pipelines.evaluation.beliefs.tokens import Told, pixel_values, tell

UNSEEN = 0.0
"""The value, from -1 to 1, of what is not shown."""


@dataclass(frozen=True)
class Panel:
    """One way of looking at the same few samples."""

    title: str
    pixels: Tensor
    """uint8 [B, C, H, W] or [B, C, T, H, W]."""


def make_panels(scene: Scene, train: Told, count: int, seed: int) -> list[Panel]:
    """Draws the first samples, each behind a mask of its own.

    Args:
        scene: the test set; the first samples are taken as they are stored.
        train: samples whose patches are shown as the nearest ones.
        count: number of samples.
        seed: of the flow decoder's noise.
    """
    told = tell(scene.expectation, scene.prep, scene.pixels[:count], scene.masks)
    values_BNP = pixel_values(scene.expectation, told.pixels)
    masks = [scene.masks[row % len(scene.masks)] for row in range(len(told))]
    seen_BN = torch.zeros_like(told.hidden_BN)
    for row, mask in enumerate(masks):
        seen_BN[row, mask.context_K] = True

    def pasted(drawn_BNP: Tensor) -> Tensor:
        return torch.where(told.hidden_BN[..., None], drawn_BNP, values_BNP)

    def decoded(tokens_BND: Tensor) -> Tensor:
        return pasted(scene.drawn(scene.decoders.regression, tokens_BND, told.hidden_BN))

    drawn = {
        "sample": values_BNP,
        "what is seen": values_BNP.masked_fill(~seen_BN[..., None], UNSEEN),
        "expected": decoded(told.expected_BND),
        **_samples(scene, told, pasted, seed),
        "nearest": pasted(_nearest(scene, told, masks, train)),
        "true tokens": decoded(told.targets_BND),
    }
    encoder = scene.expectation.encoder
    return [Panel(title, unpatchify(to_bytes(one), encoder)) for title, one in drawn.items()]


def _samples(
    scene: Scene, told: Told, pasted: Callable[[Tensor], Tensor], seed: int
) -> dict[str, Tensor]:
    """Draws three samples of the flow decoder from what is expected."""
    flow, generator = scene.decoders.flow, torch.Generator().manual_seed(seed)
    if flow is None:
        return {}

    def draw(tokens_MND: Tensor, there_MN: Tensor) -> Tensor:
        return flow.sample(tokens_MND, there_MN, generator)

    return {
        f"possible {number}": pasted(scene.drawn(draw, told.expected_BND, told.hidden_BN))
        for number in (1, 2, 3)
    }


def _nearest(scene: Scene, told: Told, masks: list[Mask], train: Told) -> Tensor:
    """Takes the pixels of the training sample whose tokens are most like what is expected.

    This invents nothing: every picture is a real one, at the place where it was seen.
    """
    values_BNP = torch.full((*told.hidden_BN.shape, scene.mean_NP.shape[-1]), UNSEEN)
    for row, mask in enumerate(masks):
        expected_TD = functional.normalize(told.expected_BND[row, mask.hidden_T], dim=-1)
        known_BTD = functional.normalize(train.targets_BND[:, mask.hidden_T], dim=-1)
        best = int((known_BTD * expected_TD).sum((1, 2)).argmax())
        known_1NP = pixel_values(scene.expectation, train.pixels[best : best + 1])
        values_BNP[row, mask.hidden_T] = known_1NP[0, mask.hidden_T]
    return values_BNP
