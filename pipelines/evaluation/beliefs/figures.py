"""How much of a sample its decoded tokens tell: what is drawn is encoded again and looked for.

What is drawn from all tokens is looked for among all samples, by the mean of the target encoder's
tokens. What is drawn of a hidden region is encoded alone, so that what lies around it gives nothing
away, and looked for among the same region of all samples.

Shape suffixes: B samples, N tokens of a sample, T hidden tokens, P pixel values per token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.beliefs.expectation import Expectation, Mask
from models.beliefs.pixels import by_picture, by_sample, to_bytes, unpatchify
from models.beliefs.retrieval import chance, mean_reciprocal_rank
from models.media.preprocessing import Preprocessing
from pipelines.evaluation.beliefs.fitting import Decoders
from pipelines.evaluation.beliefs.tokens import Told, normalised_patches, pixel_values, tell

MASKS = 4
"""Masks of the hidden regions that are measured; the figures are means over them."""
SAMPLES, SAMPLED, SOUGHT = 8, 32, 256
"""Samples of the flow decoder for each of so many images or clips, to see how they differ; and of
how many one sample is looked for. A sample costs twenty passes."""
PICTURES = 512
"""Pictures that are decoded at a time."""

Draw = Callable[[Tensor, Tensor], Tensor]
"""Draws patches of tokens [M, N, D] where they are there [M, N]."""


@dataclass(frozen=True)
class Scene:
    """Samples of a test set, and what measures them."""

    expectation: Expectation
    prep: Preprocessing
    decoders: Decoders
    masks: Sequence[Mask]
    pixels: Tensor
    """uint8 [B, C, H, W] or [B, C, T, H, W]."""
    mean_NP: Tensor
    """The mean of the training set's pixel values at every place."""

    def drawn(self, draw: Draw, tokens_BND: Tensor, there_BN: Tensor) -> Tensor:
        """Decodes tokens of samples picture by picture, [B, N, P]."""
        encoder = self.expectation.encoder
        device = next(self.expectation.parameters()).device
        tokens_MND, there_MN = by_picture(tokens_BND, encoder), by_picture(there_BN, encoder)
        rows = there_MN.any(1).nonzero()[:, 0]  # nothing is drawn of other time steps
        values_MNP = torch.zeros(*there_MN.shape, self.mean_NP.shape[-1])
        with torch.no_grad():
            for part in torch.split(rows, PICTURES):
                drawn_MNP = draw(tokens_MND[part].to(device), there_MN[part].to(device))
                values_MNP[part] = drawn_MNP.cpu()
        return by_sample(values_MNP, encoder)

    @torch.no_grad()
    def seen_again(self, values_BNP: Tensor, only_T: Tensor | None = None) -> Tensor:
        """Encodes what was drawn, all of it or some tokens alone, as mean tokens [B, D]."""
        pixels = unpatchify(to_bytes(values_BNP), self.expectation.encoder)
        target, found = self.expectation.target_encoder, []
        for patches_BNP in normalised_patches(self.expectation, self.prep, pixels):
            keep = None if only_T is None else only_T.to(patches_BNP.device)
            keep = None if keep is None else keep.expand(len(patches_BNP), -1)
            found.append(target.forward_patches(patches_BNP, keep).mean(1).float().cpu())
        return torch.cat(found)


def measure(scene: Scene, seed: int) -> dict[str, Any]:
    """Returns the figures of one encoder.

    `mrr` holds mean reciprocal ranks, `error` mean squared errors of pixel values from -1 to 1 in
    the hidden regions, `cosine` the mean cosine of what is expected of a hidden token and what it
    is, and what every sample's mean has at that place instead; `flow`, with a decoder by flow
    matching, the ranks of one of its samples and how much its samples differ.
    """
    whole = tell(scene.expectation, scene.prep, scene.pixels, scene.masks[:1])
    found: dict[str, Any] = {"mrr": _of_all(scene, whole), "error": {}, "cosine": {}}
    hidden = [_of_hidden(scene, mask) for mask in scene.masks[:MASKS]]
    for part in hidden[0]:
        names = hidden[0][part]
        means = {n: sum(one[part][n] for one in hidden) / len(hidden) for n in names}
        found[part] |= means
    found["mrr"]["chance"] = chance(len(scene.pixels))
    if scene.decoders.flow is not None:
        found["flow"] = _of_samples(scene, scene.masks[0], seed)
    return found


def _of_others(per_sample: Tensor) -> Tensor:
    """Gives every sample what is another's, from half the set away: neighbours may be alike."""
    return per_sample.roll(max(1, len(per_sample) // 2), 0)


def _of_all(scene: Scene, told: Told) -> dict[str, float]:
    """Decodes all tokens, those of another sample, and their mean."""
    real_BD = scene.seen_again(pixel_values(scene.expectation, told.pixels))
    everywhere_BN = torch.ones_like(told.hidden_BN)

    def found(draw: Draw, tokens_BND: Tensor) -> float:
        drawn_BNP = scene.drawn(draw, tokens_BND, everywhere_BN)
        return mean_reciprocal_rank(scene.seen_again(drawn_BNP), real_BD)

    regression, pooled = scene.decoders.regression, scene.decoders.pooled
    mean_MND = by_picture(told.targets_BND, scene.expectation.encoder).mean(1, keepdim=True)
    count = scene.expectation.encoder.grid.per_step
    pooled_BND = by_sample(mean_MND.expand(-1, count, -1), scene.expectation.encoder)
    return {
        "all_tokens": found(regression, told.targets_BND),
        "pooled": found(pooled, pooled_BND),
        "shuffled": found(regression, _of_others(told.targets_BND)),
    }


def _of_hidden(scene: Scene, mask: Mask) -> dict[str, dict[str, float]]:
    """Decodes one hidden region from true and from expected tokens, and its controls."""
    told = tell(scene.expectation, scene.prep, scene.pixels, [mask])
    values_BNP = pixel_values(scene.expectation, told.pixels)
    real_BD = scene.seen_again(values_BNP, mask.hidden_T)
    mean_BNP = scene.mean_NP.expand_as(values_BNP)

    def draw(tokens_BND: Tensor) -> Tensor:
        return scene.drawn(scene.decoders.regression, tokens_BND, told.hidden_BN)

    drawn = {
        "hidden_true": draw(told.targets_BND),
        "hidden_expected": draw(told.expected_BND),
        "hidden_shuffled": draw(_of_others(told.expected_BND)),
        "hidden_mean_picture": mean_BNP,
    }

    def found(drawn_BNP: Tensor) -> float:
        return mean_reciprocal_rank(scene.seen_again(drawn_BNP, mask.hidden_T), real_BD)

    def error(drawn_BNP: Tensor) -> float:
        differences = (drawn_BNP - values_BNP)[:, mask.hidden_T]
        return float(differences.square().mean())

    return {
        "mrr": {name: found(drawn_BNP) for name, drawn_BNP in drawn.items()},
        "error": {name: error(drawn_BNP) for name, drawn_BNP in drawn.items()},
        "cosine": _cosines(told, mask),
    }


def _cosines(told: Told, mask: Mask) -> dict[str, float]:
    targets_BTD = told.targets_BND[:, mask.hidden_T]
    expected_BTD = told.expected_BND[:, mask.hidden_T]
    same = functional.cosine_similarity
    return {
        "expected": float(same(expected_BTD, targets_BTD, dim=-1).mean()),
        "shuffled": float(same(_of_others(expected_BTD), targets_BTD, dim=-1).mean()),
        "place": float(same(targets_BTD.mean(0, keepdim=True), targets_BTD, dim=-1).mean()),
    }


def _of_samples(scene: Scene, mask: Mask, seed: int) -> dict[str, float]:
    """Draws samples of a hidden region by flow matching.

    Returns:
        The ranks of one sample each, and the standard deviation over `SAMPLES` samples of a pixel
        value, with true and with expected tokens.
    """
    flow, generator = scene.decoders.flow, torch.Generator().manual_seed(seed)
    assert flow is not None
    told = tell(scene.expectation, scene.prep, scene.pixels, [mask])
    values_BNP = pixel_values(scene.expectation, told.pixels)
    real_BD = scene.seen_again(values_BNP, mask.hidden_T)

    def sample(tokens_BND: Tensor, count: int) -> Tensor:
        def draw(tokens_MND: Tensor, there_MN: Tensor) -> Tensor:
            return flow.sample(tokens_MND, there_MN, generator)

        return scene.drawn(draw, tokens_BND[:count], told.hidden_BN[:count])

    found = {}
    for name, tokens_BND in (("true", told.targets_BND), ("expected", told.expected_BND)):
        again_BD = scene.seen_again(sample(tokens_BND, SOUGHT), mask.hidden_T)
        found[f"hidden_{name}"] = mean_reciprocal_rank(again_BD, real_BD)
        several = [sample(tokens_BND, SAMPLED)[:, mask.hidden_T] for _ in range(SAMPLES)]
        found[f"spread_{name}"] = float(torch.stack(several).std(0).mean())
    return found
