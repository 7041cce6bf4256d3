"""Fitted probes as maps over the patches: where in a picture a probe reads its answer.

Shape suffixes: B images or clips, T tokens (patches), D feature width, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipelines.evaluation.probes.attentive_sweep import AttentiveProbes


class Readout(Protocol):
    """A fitted probe that says of every token what it adds to the answer."""

    @property
    def signed(self) -> bool:
        """Whether a token can count against the answer; else the map is a share of attention."""
        ...

    def maps(self, tokens_BTD: Tensor) -> Tensor:
        """Returns the map of every sample over its tokens, [B, T]."""
        ...

    def answers(self, tokens_BTD: Tensor) -> Tensor:
        """Returns the answers: a class index or a number of every sample, [B]."""
        ...


@dataclass(frozen=True)
class LinearReadout:
    """A linear function of the mean token, which is a sum over the tokens.

    The map of a number sums to the number less `offset_C`, that of classes to the winning class's
    logit less its offset: T tokens x_t contribute (x_t - mean) @ weight / T each.
    """

    mean_D: Tensor
    weight_DC: Tensor
    offset_C: Tensor
    signed: bool = True

    def contributions(self, tokens_BTD: Tensor) -> Tensor:
        """Returns what every token adds to every output, [B, T, C]; 0 for one that is NaN."""
        centred_BTD = tokens_BTD.to(self.weight_DC) - self.mean_D
        missing_BT1 = tokens_BTD[..., :1].isnan().to(centred_BTD.device)
        count_B11 = (~missing_BT1).sum(dim=1, keepdim=True)
        return (centred_BTD @ self.weight_DC).masked_fill(missing_BT1, 0) / count_B11

    def maps(self, tokens_BTD: Tensor) -> Tensor:
        """Returns what every token adds to the winning class, or to the number, [B, T]."""
        added_BTC = self.contributions(tokens_BTD)
        winner_B = self._outputs(added_BTC).argmax(dim=1)
        return added_BTC[torch.arange(len(added_BTC)), :, winner_B]

    def answers(self, tokens_BTD: Tensor) -> Tensor:
        """Returns the winning classes, or the numbers, [B]."""
        outputs_BC = self._outputs(self.contributions(tokens_BTD))
        return outputs_BC[:, 0] if outputs_BC.shape[1] == 1 else outputs_BC.argmax(dim=1)

    def _outputs(self, added_BTC: Tensor) -> Tensor:
        return added_BTC.sum(dim=1) + self.offset_C


@dataclass(frozen=True)
class AttentionReadout:
    """Attention of the probe of a sweep that was picked, as the mean over its heads."""

    probes: AttentiveProbes
    best: int
    scale: tuple[float, float] | None = None
    """Offset and factor of a number's units; None for classes."""
    signed: bool = False

    @torch.no_grad()
    def maps(self, tokens_BTD: Tensor) -> Tensor:
        """Returns the share of the attention that every token gets, [B, T]."""
        return self.probes.attention(self._placed(tokens_BTD))[self.best].mean(dim=1)

    @torch.no_grad()
    def answers(self, tokens_BTD: Tensor) -> Tensor:
        """Returns the winning classes, or the numbers, [B]."""
        outputs_BC = self.probes(self._placed(tokens_BTD))[self.best]
        if self.scale is None:
            classes_B: Tensor = outputs_BC.argmax(dim=1)
            return classes_B
        numbers_B: Tensor = outputs_BC[:, 0] * self.scale[1] + self.scale[0]
        return numbers_B

    def _placed(self, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD.to(self.probes.query.device)
