"""What I-JEPA, V-JEPA and DMJD have in common: context encoder, EMA target encoder and predictor.

Shape legend: B images or clips, N tokens of the whole input, P pixel values per token, K context
tokens, M target blocks, T tokens of a block, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, Self, TypeVar

import torch
from torch import nn
from torch.nn import functional

from models.encoders.blocks import LN_EPS
from models.encoders.from_settings import (
    Settings,
    encoder_from_settings,
    predictor_from_settings,
)
from models.encoders.kept_tokens import KeptTokens
from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer
from models.objectives.objective import EncoderObjective, pixel_statistics
from models.synced import mean_over_processes

M = TypeVar("M", bound=nn.Module)

TARGET_EPS = 1e-4

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DISTANCES: dict[str, Distance] = {
    "smooth_l1": functional.smooth_l1_loss,
    "l2": functional.mse_loss,
    "l1": functional.l1_loss,
}


def layer_normalised(tokens_BND: torch.Tensor) -> torch.Tensor:
    """Layer-normalises every token without affine parameters."""
    return functional.layer_norm(tokens_BND, tokens_BND.shape[-1:], eps=LN_EPS)


def without_common(tokens_BND: torch.Tensor) -> torch.Tensor:
    """Layer-normalises every token and takes the mean of its sample's tokens away."""
    tokens_BND = layer_normalised(tokens_BND)
    return tokens_BND - tokens_BND.mean(1, keepdim=True)


def batch_standardised(tokens_BND: torch.Tensor) -> torch.Tensor:
    """Standardises layer-normalised tokens, see `standardised`; fp32 [B, N, D].

    What remains to be predicted is how a sample differs from others at that place. A mean squared
    error of 1 is that of predicting nothing but the place.
    """
    return standardised(layer_normalised(tokens_BND.float()))


def place_standardised(tokens_BND: torch.Tensor) -> torch.Tensor:
    """Like `batch_standardised`, but of tokens `without_common`; fp32 [B, N, D].

    What remains to be predicted is how a place differs from the others of its sample. A mean
    squared error of 1 is that of knowing the place and everything that all tokens of a sample say.
    """
    return standardised(without_common(tokens_BND.float()))


def standardised(tokens_BND: torch.Tensor) -> torch.Tensor:
    """Centres every dimension at every place of the grid over the batches of all processes, and
    divides it by its standard deviation over the batch and the grid.
    """
    centred_BND = tokens_BND - mean_over_processes(tokens_BND.mean(0))
    variance_D = mean_over_processes(centred_BND.square().mean((0, 1)))
    return centred_BND * (variance_D + TARGET_EPS).rsqrt()


TARGET_NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "token": layer_normalised,
    "batch": batch_standardised,
    "local": place_standardised,
}
OVER_BATCHES = ("batch", "local")
"""Those of `TARGET_NORMS` that compare the samples of a batch."""
Predicted = Literal["tokens", "mean"]
"""What is predicted of hidden tokens: every one of them, or their mean."""


class LatentPrediction(EncoderObjective):
    """Predicts the target encoder's features of regions that the context encoder does not see.

    Args:
        encoder: the context encoder; the target encoder starts as a copy of it.
        predictor: maps context tokens and target positions to target tokens.
        loss: entry of `DISTANCES`.
        ema: momentum of the target encoder at the first and the last step; linear in between.
        target: `ema`, or `self` for a negative control that must collapse: it has no target encoder
            and does not stop the gradient of the targets.
        target_norm: entry of `TARGET_NORMS`.
        predict: `tokens` predicts every hidden token, `mean` the mean of those of a block.
        mean: channel means that are subtracted from the pixels, of values in [0, 1].
        std: channel standard deviations that the pixels are divided by.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        loss: str,
        ema: tuple[float, float],
        target: str = "ema",
        target_norm: str = "token",
        predict: Predicted = "tokens",
    ) -> None:
        super().__init__(encoder, mean=mean, std=std)
        self.predictor, self.predict = predictor, predict
        self.target_encoder: VisionTransformer | None
        self.target_encoder = make_target(encoder) if target == "ema" else None
        self.distance = DISTANCES[loss]
        # Means are compared over the batch only after they were taken.
        self.normalise_targets = TARGET_NORMS["token" if predict == "mean" else target_norm]
        self.target_norm = target_norm
        self.ema = ema

    @classmethod
    def from_settings(cls, model: Settings, objective: Settings) -> Self:
        """See `EncoderObjective.from_settings`."""
        encoder = encoder_from_settings(model)
        return cls(
            encoder,
            cls.make_predictor(model, encoder),
            loss=objective["loss"],
            ema=tuple(objective["ema"]),
            target=objective["target"],
            target_norm=objective.get("target_norm", "token"),
            predict=objective.get("predict", "tokens"),
            **pixel_statistics(model),
        )

    @classmethod
    def make_predictor(cls, model: Settings, encoder: VisionTransformer) -> Predictor:
        """Builds the predictor with a single, randomly initialised mask token."""
        return predictor_from_settings(model, encoder)

    @property
    def feature_encoder(self) -> VisionTransformer:
        """The target encoder, or the context encoder if `target` is `self`."""
        return self.encoder if self.target_encoder is None else self.target_encoder

    @property
    def regularizable(self) -> tuple[str, ...]:
        """The context features; with `target` set to `self`, the target features as well."""
        both = ("context_pooled", "target_pooled")
        return both if self.target_encoder is None else both[:1]

    def encode_target(
        self, patches_BNP: torch.Tensor, kept: KeptTokens | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the target encoder's features of the whole input.

        Args:
            patches_BNP: output of `PatchEmbed.patchify`.
            kept: the tokens that the samples have; None for all.

        Returns:
            The mean of the target encoder's tokens, fp32 [B, D], and the tokens themselves,
            normalised, from which targets are gathered, [B, N, D]; if means are predicted, only
            layer-normalised.

        Raises:
            ValueError: targets are standardised at their places over the batch, but samples lack
                tokens.
        """
        compares_places = self.target_norm in OVER_BATCHES and self.predict == "tokens"
        if kept is not None and compares_places:
            raise ValueError(
                f"--objective.target-norm {self.target_norm}: places are compared over the batch, "
                "but here samples lack tokens (--data.fit whole or pad, or --data.exclude)"
            )
        if self.target_encoder is None:
            tokens_BND, pooled_BD = _encode(self.encoder, patches_BNP, kept)
        else:
            with torch.no_grad():
                tokens_BND, pooled_BD = _encode(self.target_encoder, patches_BNP, kept)
        return pooled_BD.float(), self.normalise_targets(tokens_BND)

    def prediction_loss(
        self,
        context_BKD: torch.Tensor,
        context_ids_BK: torch.Tensor,
        targets_BMTD: torch.Tensor,
        target_ids_BMT: torch.Tensor,
        *,
        mask: int = 0,
        grids_B2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the distance of what is predicted of hidden tokens from what they are, a scalar.

        Args:
            context_BKD: output of the context encoder.
            targets_BMTD: the target encoder's tokens of every block, from `encode_target`.

        The other arguments are those of `Predictor.forward`.
        """
        if self.predict == "mean":
            means_BMD = targets_BMTD.float().mean(2)
            over_batch = self.target_norm == "batch"
            targets_BMTD = (standardised(means_BMD) if over_batch else means_BMD)[:, :, None]
            # The mean belongs to no place. It is asked for at that of token 0 in every sample.
            target_ids_BMT = torch.zeros_like(target_ids_BMT[:, :, :1])
        predicted_BMTD = self.predictor(context_BKD, context_ids_BK, target_ids_BMT, mask, grids_B2)
        return self.distance(predicted_BMTD.float(), targets_BMTD.float())

    def momentum(self, step: int, total_steps: int) -> float:
        """Returns the momentum of the target encoder at optimizer step `step` (0-based)."""
        start, end = self.ema
        return start + (end - start) * step / total_steps

    def after_step(self, step: int, total_steps: int) -> None:
        """Moves the target encoder towards the context encoder; see `update_target`."""
        if self.target_encoder is not None:
            update_target(self.target_encoder, self.encoder, self.momentum(step, total_steps))


def _encode(
    encoder: VisionTransformer, patches_BNP: torch.Tensor, kept: KeptTokens | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all tokens and their mean."""
    if kept is not None:
        tokens_BKD = kept.encode(encoder, patches_BNP)
        return kept.in_grid(tokens_BKD, patches_BNP.shape[1]), kept.mean(tokens_BKD)
    tokens_BND = encoder.forward_patches(patches_BNP)
    return tokens_BND, tokens_BND.mean(1)


def make_target(encoder: M) -> M:
    """Returns a copy of `encoder` whose parameters do not require gradients."""
    return copy.deepcopy(encoder).requires_grad_(False)


@torch.no_grad()
def update_target(target: nn.Module, encoder: nn.Module, momentum: float) -> None:
    """Sets target <- momentum * target + (1 - momentum) * encoder, in one multi-tensor pass.

    This happens in fp32, the dtype of the weights: in the papers 1 - momentum is at most 4e-3, and
    bf16 would round such small changes of a weight away.
    """
    torch._foreach_lerp_(list(target.parameters()), list(encoder.parameters()), 1.0 - momentum)
