"""What a trained predictor expects of tokens that it does not see, and what they really are.

Shape legend: B images or clips, N tokens of the whole input, P pixel values per token, K context
tokens, T hidden tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer, gather_tokens
from models.objectives.latent import (
    OVER_BATCHES,
    TARGET_EPS,
    LatentPrediction,
    layer_normalised,
    without_common,
)
from models.objectives.objective import Objective, WrappedObjective


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which tokens are seen and which are to be expected, by their numbers in the grid, int64."""

    context_K: Tensor
    hidden_T: Tensor
    generator: int = 0
    """Number of the predictor's mask token."""


class Expectation(nn.Module):
    """Context encoder, predictor and target encoder of a trained objective, frozen.

    A target is a token of the target encoder, normalised as the objective does it. One that
    standardises its targets over the batch gets the statistics of a sample instead, so that what is
    expected of one picture does not depend on others.

    Args:
        encoder: the context encoder.
        predictor: was trained with it.
        target_encoder: may be `encoder` itself.
        target_norm: entry of `models.objectives.latent.TARGET_NORMS`; see `fit`.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        target_encoder: VisionTransformer,
        *,
        target_norm: str = "token",
    ) -> None:
        super().__init__()
        self.encoder, self.predictor, self.target_encoder = encoder, predictor, target_encoder
        self.target_norm, self.standardised = target_norm, target_norm in OVER_BATCHES
        self.place_mean_ND: Tensor
        self.variance_D: Tensor
        count, width = encoder.num_patches, encoder.width
        self.register_buffer("place_mean_ND", torch.zeros(count, width))
        self.register_buffer("variance_D", torch.ones(width))
        self.eval().requires_grad_(False)

    @classmethod
    def of(cls, objective: Objective) -> Expectation:
        """Takes the networks of an objective.

        Raises:
            ValueError: it predicts no tokens, or only their mean.
        """
        while isinstance(objective, WrappedObjective):
            objective = objective.objective
        if not isinstance(objective, LatentPrediction):
            name = type(objective).__name__
            raise ValueError(
                f"{name} has no predictor of hidden tokens; ijepa, vjepa and dmjd have one"
            )
        if objective.predict == "mean":
            raise ValueError(
                "the run predicts the mean of hidden tokens (--objective.predict mean), so that it "
                "expects nothing of a place; --objective.predict tokens does"
            )
        return cls(
            objective.encoder,
            objective.predictor,
            objective.feature_encoder,
            target_norm=objective.target_norm,
        )

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Takes the statistics of targets from patches [B, N, P], if targets are standardised."""
        if not self.standardised:
            return
        total_ND = torch.zeros_like(self.place_mean_ND, dtype=torch.float64)
        squares_D, count = torch.zeros_like(self.variance_D, dtype=torch.float64), 0
        for patches_BNP in batches:
            tokens_BND = self._tokens(patches_BNP)
            total_ND += tokens_BND.double().sum(0)
            squares_D += tokens_BND.double().square().mean(1).sum(0)
            count += len(tokens_BND)
        mean_ND = total_ND / count
        self.place_mean_ND.copy_(mean_ND)
        self.variance_D.copy_(squares_D / count - mean_ND.square().mean(0))

    def patches(self, pixels: Tensor) -> Tensor:
        """Cuts normalised images or clips into patches, [B, N, P]."""
        return self.encoder.patch_embed.patchify(pixels)

    def targets(self, patches_BNP: Tensor) -> Tensor:
        """Returns what the tokens really are, fp32 [B, N, D]."""
        tokens_BND = self._tokens(patches_BNP)
        if not self.standardised:
            return tokens_BND
        return (tokens_BND - self.place_mean_ND) * (self.variance_D + TARGET_EPS).rsqrt()

    def _tokens(self, patches_BNP: Tensor) -> Tensor:
        """Returns the target encoder's tokens before they are standardised, fp32 [B, N, D]."""
        tokens_BND = self.target_encoder.forward_patches(patches_BNP).float()
        return (without_common if self.target_norm == "local" else layer_normalised)(tokens_BND)

    def expect(self, patches_BNP: Tensor, mask: Mask) -> Tensor:
        """Returns what the predictor says of the hidden tokens, fp32 [B, T, D]."""
        B, device = len(patches_BNP), patches_BNP.device
        context_ids_BK = mask.context_K.to(device).expand(B, -1)
        context_BKD = self.encoder.forward_patches(patches_BNP, context_ids_BK)
        hidden_ids_B1T = mask.hidden_T.to(device).expand(B, 1, -1)
        predicted_B1TD: Tensor = self.predictor(
            context_BKD, context_ids_BK, hidden_ids_B1T, mask.generator
        )
        return predicted_B1TD[:, 0].float()

    def matched(self, expected_BTD: Tensor) -> Tensor:
        """Gives expected tokens the scale of targets, for what was trained on those.

        A prediction under uncertainty is shorter than its targets, which have unit variance.
        """
        return expected_BTD if self.standardised else layer_normalised(expected_BTD)


class Surprise(nn.Module):
    """How wrong the predictor is, compared with how wrong it usually is at that place.

        e_n = sum over the masks m that hide n of mean_d (expected_mnd - target_nd)^2
        u_n = the mean of e_n over ordinary samples, at least `FLOOR` of its mean over places
        surprise of a set of tokens = sum e_n / sum u_n

    So 1 is as usual, and 2 is twice the usual error. It is told for single tokens (a map), for time
    steps, and for the whole input. A token that no mask hides has no surprise: NaN.

    Args:
        expectation: the networks.
        masks: one after the other hides part of the input.
    """

    FLOOR = 0.05

    def __init__(self, expectation: Expectation, masks: Sequence[Mask]) -> None:
        super().__init__()
        self.expectation, self.masks = expectation, list(masks)
        self.usual_N: Tensor
        count = expectation.encoder.num_patches
        self.register_buffer("usual_N", torch.ones(count))
        hidden_N = torch.zeros(count, dtype=torch.bool)
        for mask in masks:
            hidden_N[mask.hidden_T] = True
        self.hidden_N: Tensor
        self.register_buffer("hidden_N", hidden_N, persistent=False)

    def errors(self, patches_BNP: Tensor) -> Tensor:
        """Returns e_n, fp32 [B, N]; 0 where no mask hides a token."""
        targets_BND = self.expectation.targets(patches_BNP)
        errors_BN = torch.zeros_like(targets_BND[..., 0])
        for mask in self.masks:
            expected_BTD = self.expectation.expect(patches_BNP, mask)
            hidden_BT = mask.hidden_T.to(patches_BNP.device).expand(len(patches_BNP), -1)
            distances_BT = (expected_BTD - gather_tokens(targets_BND, hidden_BT)).square().mean(-1)
            errors_BN.scatter_add_(1, hidden_BT, distances_BT)
        return errors_BN

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Takes the usual errors from patches [B, N, P] of ordinary samples.

        Raises:
            ValueError: there are none.
        """
        total_N, count = torch.zeros_like(self.usual_N, dtype=torch.float64), 0
        for patches_BNP in batches:
            total_N += self.errors(patches_BNP).double().sum(0)
            count += len(patches_BNP)
        if not count:
            raise ValueError("there is no sample to tell usual errors from")
        usual_N = total_N / count
        floor = self.FLOOR * usual_N[self.hidden_N].mean()
        self.usual_N.copy_(usual_N.clamp(min=floor) * self.hidden_N)

    def map(self, errors_BN: Tensor) -> Tensor:
        """Returns the surprise of every token, [B, N]."""
        return errors_BN / self.usual_N.masked_fill(~self.hidden_N, torch.nan)

    def by_step(self, errors_BN: Tensor) -> Tensor:
        """Returns the surprise of every time step, [B, S]; an image has one."""
        steps = self.expectation.encoder.grid.tubes
        usual_S = self.usual_N.reshape(steps, -1).sum(-1)
        return errors_BN.reshape(len(errors_BN), steps, -1).sum(-1) / usual_S

    def whole(self, errors_BN: Tensor) -> Tensor:
        """Returns the surprise of every input, [B]."""
        return errors_BN.sum(-1) / self.usual_N.sum()
