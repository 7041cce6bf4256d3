"""Surprise of a test set, and whether it tells cuts from ordinary clips.

Shape suffixes: B samples, N tokens of a sample, S time steps, C channels, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.beliefs.expectation import Expectation, Mask, Surprise
from models.media.preprocessing import Preprocessing
from pipelines.evaluation.beliefs.tokens import normalised_patches


def calibrated(
    expectation: Expectation, prep: Preprocessing, masks: Sequence[Mask], pixels: Tensor
) -> Surprise:
    """Makes the measure of surprise, with the usual errors of these ordinary samples."""
    surprise = Surprise(expectation, masks).to(next(expectation.parameters()).device)
    with torch.no_grad():
        surprise.calibrate(normalised_patches(expectation, prep, pixels))
    return surprise


@torch.no_grad()
def errors_of(surprise: Surprise, prep: Preprocessing, pixels: Tensor) -> Tensor:
    """Returns the errors of images or clips, [B, N]; see `Surprise.errors`."""
    batches = normalised_patches(surprise.expectation, prep, pixels)
    return torch.cat([surprise.errors(patches_BNP) for patches_BNP in batches])


def spliced(clips_BCTHW: Tensor) -> Tensor:
    """Cuts from each clip to the next one of the batch in the middle."""
    half = clips_BCTHW.shape[2] // 2
    return torch.cat([clips_BCTHW[:, :, :half], clips_BCTHW.roll(1, 0)[:, :, half:]], dim=2)


def pixel_change(clips_BCTHW: Tensor) -> Tensor:
    """Returns the greatest mean difference of successive frames, [B]: what needs no model."""
    differences_BCTHW = clips_BCTHW.float().diff(dim=2).abs()
    return differences_BCTHW.mean((1, 3, 4)).max(1).values


def auroc(ordinary_B: Tensor, odd_B: Tensor) -> float:
    """Returns the chance that an odd sample scores above an ordinary one; ties count half."""
    above_BB = odd_B[:, None] - ordinary_B[None]
    return float(((above_BB > 0).double() + 0.5 * (above_BB == 0).double()).mean())


def tells_apart(
    surprises: dict[str, Surprise], prep: Preprocessing, ordinary: Tensor, odd: Tensor
) -> dict[str, float]:
    """Returns the AUROC of each measure of surprise, and of the change of pixels.

    A clip scores as its most surprising time step, as it does by its greatest change of pixels.
    """

    def scores(surprise: Surprise, clips: Tensor) -> Tensor:
        return surprise.by_step(errors_of(surprise, prep, clips)).amax(1)

    found = {
        name: auroc(scores(one, ordinary), scores(one, odd)) for name, one in surprises.items()
    }
    return found | {"pixel_change": auroc(pixel_change(ordinary), pixel_change(odd))}
