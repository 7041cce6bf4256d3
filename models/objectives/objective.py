"""The interface between objectives and the trainer.

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
"""Tensors by name, at least those listed in `Objective.inputs`.

- Pixels: `images` uint8 [B, C, H, W], or `clips` uint8 [B, C, T, H, W].
- `sample_keys` int64 [B]: 64 random bits per sample, fixed by (seed, epoch, sample id). Everything
  random about a sample follows from them.
- Masks of images: `context_ids` int64 [B, K] and `target_ids` int64 [B, M, T] with M target blocks;
  or, with C contexts per image, [B, C, K] and [B, C, T].
- Masks of clips: for every mask generator g = 0, 1, ..., `context_ids_g` int64 [B, K_g] and
  `target_ids_g` int64 [B, T_g].
- `sets` int64 [B]: which of the data sets of a mix a sample is from, 0 for `--data.train`; absent
  without a mix.
- `actions` float32 [B, T - 1, A], for world models: what was done between each frame of a clip and
  the next; NaN where the segment has ended and the clip only repeats its last frame.
- The entries `OPTIONAL_INPUTS`, where the loader makes them.

Masks are drawn by the masker of the run, see `pipelines.loading.masks.maskers`. Their lengths are
the same in all batches of a run.
"""

OPTIONAL_INPUTS = ("grids", "kept_ids", "kept_valid", "regions")
"""Entries that a batch has only if samples have grids of their own or regions are left out.

- `grids` int64 [B, 2]: rows and columns of each sample's grid, in which its tokens are numbered.
- `kept_ids` int64 [B, K'] and `kept_valid` bool [B, K']: the tokens that a sample has, and which of
  these are not padding.
- `regions` float32 [B, R, 4], where regions are left out: left, top, right and bottom of each, as
  fractions of the sample's width and height. They may reach beyond it.
"""


@dataclass
class Output:
    """What an objective computes from a batch."""

    loss: Tensor
    """The scalar to minimise, fp32."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars to log, on the device; reading them makes the host wait for it."""
    monitored: dict[str, Tensor] = field(default_factory=dict)
    """Features by name, fp32 [N, D], still attached to the graph.

    `Regularized` adds SIGReg of one of them to the loss. The collapse watch reads those in
    `Objective.watched`.
    """


class Objective(nn.Module, ABC):
    """Holds all networks of a method. `forward` computes the loss, so that DDP can wrap it."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch entries that the objective reads; they must be on its device."""

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Computes the loss of a batch.

        Args:
            batch: at least the entries in `inputs`, on the objective's device.
        """

    def after_step(self, step: int, total_steps: int) -> None:
        """Is called after optimizer step `step` (0-based) of `total_steps`.

        Objectives override it for what is not trained by gradients, such as an EMA target.
        """

    @property
    @abstractmethod
    def feature_encoder(self) -> nn.Module:
        """The network that is evaluated, exported and served."""

    @property
    def regularizable(self) -> tuple[str, ...]:
        """Names of the features in `Output.monitored` that `Regularized` can be applied to.

        These are the ones that have a gradient.
        """
        return ("target_pooled",)

    @property
    def watched(self) -> dict[str, int]:
        """The features that the collapse watch reads: names in `Output.monitored`, and how many of
        their columns."""
        width = self.feature_encoder.width
        assert isinstance(width, int)
        return {"target_pooled": width}


class WrappedObjective(Objective):
    """Adds something to the loss of another objective; everything else is that objective's.

    Args:
        objective: the objective that is wrapped.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the objective."""
        return self.objective.inputs

    @property
    def feature_encoder(self) -> nn.Module:
        """The feature encoder of the objective."""
        return self.objective.feature_encoder

    @property
    def regularizable(self) -> tuple[str, ...]:
        """The features of the objective that can be regularized."""
        return self.objective.regularizable

    @property
    def watched(self) -> dict[str, int]:
        """The features of the objective that the collapse watch reads."""
        return self.objective.watched

    def after_step(self, step: int, total_steps: int) -> None:
        """Calls the objective's `after_step`."""
        self.objective.after_step(step, total_steps)


class RegisteredObjective(Objective):
    """An objective that can be registered by name, because it is built from settings."""

    @classmethod
    @abstractmethod
    def from_settings(cls, model: Settings, objective: Settings) -> Self:
        """Builds the objective with fresh weights.

        Args:
            model: fields of `pipelines.config.train.ModelConfig`.
            objective: fields of the objective's own class in `pipelines.config.objectives`, and the
                run's `views` and `seed`.

        Raises:
            ValueError: the settings are incompatible.
        """


class EncoderObjective(RegisteredObjective):
    """An objective that trains one encoder.

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

    @property
    def feature_encoder(self) -> VisionTransformer:
        """The encoder."""
        return self.encoder


def pixel_statistics(model: Settings) -> dict[str, Any]:
    """Returns the arguments `mean` and `std` of `EncoderObjective`."""
    return {"mean": model["mean"], "std": model["std"]}
