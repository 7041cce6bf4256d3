"""`--anchor.weight`: keeps an encoder's features of old footage where an earlier encoder had them.

Probes that were fitted on the earlier encoder's features then go on working. This is learning
without forgetting (Li and Hoiem 2016, arXiv 1606.09282, section 3), with features in place of class
scores, and on old footage where the paper has only new.

Shape legend: B images or clips, O of them from old footage, N tokens of each, T tokens of all O, P
pixel values per token, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.encoders.kept_tokens import KeptTokens
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import normalize
from models.objectives.objective import (
    Batch,
    EncoderObjective,
    Objective,
    Output,
    WrappedObjective,
)
from models.objectives.sigreg import Regularized
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoints import CheckpointError, load_encoder

OPTIONAL = ("grids", "kept_ids", "kept_valid")
"""Entries of a batch that say which tokens its samples have, if not all."""


class Anchored(WrappedObjective):
    """Adds to an objective's loss how far its encoder has moved on old footage.

    The term is the squared distance of the encoder's tokens from those of the frozen encoder,
    relative to the variance of the latter, times the objective's own loss: a weight of 1 counts
    features that have moved by their whole variance as much as the loss, whatever its scale. It
    reads the encoder that gradients train; a target encoder follows it. The frozen encoder is not
    in the checkpoints, whose weights have the names of an objective without this.

    Args:
        objective: the objective.
        frozen: the earlier encoder, of the same shape.
        weight: weight of the term.
    """

    def __init__(self, objective: Objective, frozen: VisionTransformer, weight: float) -> None:
        super().__init__(objective)
        self.weight = weight
        inner = objective.objective if isinstance(objective, Regularized) else objective
        assert isinstance(inner, EncoderObjective)
        self._inner = (inner,)  # in tuples, so that their weights are not this module's once more
        self._frozen = (frozen.eval().requires_grad_(False),)
        self._pixels = "clips" if "clips" in inner.inputs else "images"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the objective, and which set a row is from."""
        return (*self.objective.inputs, "sets")

    def forward(self, batch: Batch) -> Output:
        """Returns the objective's output with the term added to its loss.

        The relative squared distance is logged as the metric `anchor`.

        Args:
            batch: what the objective reads, and `sets` int64 [B], 0 for rows of new footage.
        """
        output: Output = self.objective(batch)
        names = (self._pixels, *OPTIONAL)
        old = {name: batch[name][batch["sets"] > 0] for name in names if name in batch}
        distance = self._distance(old)
        return Output(
            output.loss + self.weight * output.loss.detach() * distance,
            {**output.metrics, "anchor": distance.detach()},
            output.monitored,
        )

    def _distance(self, old: Batch) -> Tensor:
        inner, frozen = self._inner[0], self._frozen[0]
        pixels = normalize(old[self._pixels], inner.mean, inner.std)
        patches_ONP, kept = inner.encoder.patch_embed.patchify(pixels), KeptTokens.of(old)
        with torch.no_grad():
            before_TD = _tokens(frozen, patches_ONP, kept)
            variance = before_TD.var(dim=0, correction=0).mean()
        return (_tokens(inner.encoder, patches_ONP, kept) - before_TD).square().mean() / variance

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the state of the objective."""
        return self.objective.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads the state of the objective."""
        return self.objective.load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Anchored:
        # Moves with the objective to its device.
        self._frozen[0]._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _tokens(encoder: VisionTransformer, patches_ONP: Tensor, kept: KeptTokens | None) -> Tensor:
    """Encodes the tokens that the samples have, in fp32, [T, D]."""
    if kept is None:
        return encoder.forward_patches(patches_ONP).float().flatten(0, 1)
    return kept.encode(encoder, patches_ONP)[kept.valid_BK].float()


def anchored(objective: Objective, cfg: PretrainConfig) -> Objective:
    """Adds the anchor to a run's objective, if it has one.

    Raises:
        CheckpointError: the earlier encoder does not load, or has another shape.
    """
    if not cfg.anchor.weight:
        return objective
    assert cfg.anchor.checkpoint
    frozen, config, _ = load_encoder(cfg.anchor.checkpoint)
    theirs, ours = (replace(m, fit=m.chosen_fit) for m in (config.model, cfg.model))
    if theirs != ours:
        raise CheckpointError("--anchor.checkpoint: its run has other settings of --model")
    return Anchored(objective, frozen, cfg.anchor.weight)
