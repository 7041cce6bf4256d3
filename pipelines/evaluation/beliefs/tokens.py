"""The frozen tokens of a set of samples, what the predictor expects of some, and their pixels.

Shape suffixes: B samples (images or clips), N all tokens of a sample, D width, P pixel values per
token, T hidden tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.beliefs.expectation import Expectation, Mask
from models.beliefs.pixels import to_values
from models.media.preprocessing import Preprocessing, normalize

BATCH_FRAMES = 256


@dataclass(frozen=True)
class Told:
    """Samples and their tokens, all in the host's memory."""

    pixels: Tensor
    """uint8 [B, C, H, W] or [B, C, T, H, W]."""
    targets_BND: Tensor
    """What the tokens are; fp32."""
    expected_BND: Tensor
    """What the predictor expects of the hidden tokens, at the scale of targets; else 0."""
    hidden_BN: Tensor
    """Which tokens were hidden, bool."""

    def __len__(self) -> int:
        """Returns B."""
        return len(self.pixels)


def normalised_patches(
    expectation: Expectation, prep: Preprocessing, pixels: Tensor
) -> Iterator[Tensor]:
    """Yields the patches of uint8 images or clips in batches, on the device of the networks."""
    device = next(expectation.parameters()).device
    frames = pixels.shape[2] if pixels.ndim == 5 else 1
    for part in torch.split(pixels, max(1, BATCH_FRAMES // frames)):
        yield expectation.patches(normalize(part.to(device), prep.mean, prep.std))


@torch.no_grad()
def tell(
    expectation: Expectation,
    prep: Preprocessing,
    pixels: Tensor,
    masks: Sequence[Mask],
) -> Told:
    """Encodes samples; sample i is hidden by mask i modulo their number."""
    targets, expected, hidden = [], [], []
    which = [index % len(masks) for index in range(len(pixels))]
    first = 0
    for patches_BNP in normalised_patches(expectation, prep, pixels):
        targets.append(expectation.targets(patches_BNP).cpu())
        part = which[first : first + len(patches_BNP)]
        expected.append(_expected(expectation, patches_BNP, masks, part))
        hidden.append(_hidden(masks, part, patches_BNP.shape[1]))
        first += len(patches_BNP)
    return Told(pixels, torch.cat(targets), torch.cat(expected), torch.cat(hidden))


def _expected(
    expectation: Expectation, patches_BNP: Tensor, masks: Sequence[Mask], which: list[int]
) -> Tensor:
    B, N, _ = patches_BNP.shape
    expected_BND = torch.zeros(B, N, expectation.encoder.width)
    for index in sorted(set(which)):
        rows = torch.tensor([row for row, mask in enumerate(which) if mask == index])
        found_BTD = expectation.expect(patches_BNP[rows.to(patches_BNP.device)], masks[index])
        found_BTD = expectation.matched(found_BTD).cpu()
        expected_BND[rows[:, None], masks[index].hidden_T] = found_BTD
    return expected_BND


def _hidden(masks: Sequence[Mask], which: list[int], count: int) -> Tensor:
    hidden_BN = torch.zeros(len(which), count, dtype=torch.bool)
    for row, index in enumerate(which):
        hidden_BN[row, masks[index].hidden_T] = True
    return hidden_BN


def pixel_values(expectation: Expectation, pixels: Tensor) -> Tensor:
    """Returns what a decoder should draw, from -1 to 1, [B, N, P]."""
    return to_values(expectation.patches(pixels))


def on_device(expectation: Expectation, parts: Iterable[Tensor]) -> list[Tensor]:
    """Returns tensors on the device of the networks."""
    device = next(expectation.parameters()).device
    return [part.to(device) for part in parts]
