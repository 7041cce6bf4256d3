"""The interface of an objective: all that the trainer knows of it.

Shape legend: B images or clips, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.encoders.from_settings import Settings
from models.encoders.vit import VisionTransformer

Batch = dict[str, Tensor]
"""Tensors by name: at least those in `Objective.inputs`.

Images: `images` uint8 [B, C, H, W]. Clips: `clips` uint8 [B, C, T, H, W]. Of both `sample_keys`
int64 [B], 64 random bits fixed by (seed, epoch, sample id), by which anything random about a sample
is drawn. Masks, by what the run's masker draws (`pipelines.loading.masks.maskers`): of images
`context_ids` int64 [B, K] and `target_ids` int64 [B, M, T] of M target blocks, or both with an axis
of C contexts, [B, C, K] and [B, C, T]; of clips, for every mask generator g = 0, 1, ...
`context_ids_g` int64 [B, K_g] and `target_ids_g` int64 [B, T_g]. Lengths are the same in all
batches of a run. """


@dataclass
class Output:
    """One evaluation of an objective."""

    loss: Tensor
    """Scalar to descend, fp32."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars to log; reading them is the caller's host sync."""
    monitored: dict[str, Tensor] = field(default_factory=dict)
    """fp32 features [N, D], with their gradient where they have one, for `Regularized` and, of
    `Objective.watched`, the collapse watch."""


class Objective(nn.Module, ABC):
    """Holds every network of a method; `forward` is the loss, so that DDP can wrap it."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """The batch entries that the objective reads: what has to be on its device."""

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Returns the loss of a batch."""

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after optimizer step `step` (0-based) of `total_steps`; EMA goes here."""

    @property
    @abstractmethod
    def feature_encoder(self) -> nn.Module:
        """The network to evaluate, export and serve."""

    @property
    def regularizable(self) -> tuple[str, ...]:
        """Which of `Output.monitored` have a gradient, so that `Regularized` can be of them."""
        return ("target_pooled",)

    @property
    def watched(self) -> dict[str, int]:
        """Which of `Output.monitored` the collapse watch judges, and how many of their columns."""
        width = self.feature_encoder.width
        assert isinstance(width, int)
        return {"target_pooled": width}


class EncoderObjective(Objective):
    """An objective around one encoder, which can be registered by name.

    Args:
        encoder: the network that is trained.
        mean: channel means that are subtracted from the pixels, of values in [0, 1].
        std: channel standard deviations that the pixels are divided by.
    """

    def __init__(
        self, encoder: VisionTransformer, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @classmethod
    @abstractmethod
    def from_settings(cls, model: Settings, objective: Settings) -> Self:
        """Builds the objective with fresh weights.

        Args:
            model: fields of `pipelines.config.train.ModelConfig`.
            objective: fields of the objective's own class in `pipelines.config.objectives`, and the
                run's `views` and `seed`.
        """

    @property
    def feature_encoder(self) -> VisionTransformer:
        """The encoder."""
        return self.encoder


def pixel_statistics(model: Settings) -> dict[str, Any]:
    """Returns the arguments `mean` and `std` of `EncoderObjective`."""
    return {"mean": model["mean"], "std": model["std"]}
