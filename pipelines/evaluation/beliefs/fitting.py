"""Trains decoders on frozen tokens.

Shape suffixes: M pictures (images, or time steps of clips), N tokens of a picture, D width, P pixel
values per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.beliefs.decoder import Decoder, FlowDecoder, flow_loss, regression_loss
from models.beliefs.expectation import Expectation
from models.beliefs.pixels import by_picture
from pipelines.evaluation.beliefs.tokens import Told, on_device, pixel_values

TOKENS, LEAST = 1024, 8
"""Tokens of a batch, and pictures of it at least."""
LR, WARMUP, DECAY, CLIP = 2e-3, 50, 0.01, 1.0
WHOLE = 0.5
"""Share of pictures that are shown with all their tokens, and not only with the hidden ones."""
EXPECTED = 0.5
"""Share of the others that get what the predictor expects, not what is there. The two differ a
little in kind, and a decoder that never saw the first would draw it badly for that reason alone."""


@dataclass(frozen=True)
class Decoders:
    """Decoders of one encoder's tokens."""

    regression: Decoder
    pooled: Decoder
    """Gets the mean of a picture's tokens at every place."""
    flow: FlowDecoder | None = None


def fit_decoders(
    expectation: Expectation,
    told: Told,
    *,
    steps: int,
    seed: int,
    flow: bool,
    advance: Callable[[], object] = lambda: None,
) -> Decoders:
    """Trains a decoder by regression, one of pooled tokens, and with `flow` one by flow matching.

    Args:
        expectation: the frozen networks.
        told: samples to learn from.
        steps: optimizer steps of each decoder.
        seed: of their weights and of the batches.
        flow: whether to train the third.
        advance: is called after every step.
    """
    encoder = expectation.encoder
    sizes: dict[str, Any] = {
        "grid": encoder.grid,
        "token_width": encoder.width,
        "patch_values": encoder.patch_embed.proj.weight[0].numel(),
    }
    device = next(expectation.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        regression, pooled = (Decoder(**sizes).to(device) for _ in range(2))
        flowing = FlowDecoder(**sizes).to(device) if flow else None
    pictures = _Pictures.of(expectation, told)
    _fit(regression, pictures, steps, seed, advance)
    _fit(pooled, pictures.pooled(), steps, seed, advance)
    if flowing is not None:
        _fit(flowing, pictures, steps, seed, advance)
    return Decoders(regression, pooled, flowing)


@dataclass(frozen=True)
class _Pictures:
    targets_MND: Tensor
    expected_MND: Tensor
    hidden_MN: Tensor
    values_MNP: Tensor

    @classmethod
    def of(cls, expectation: Expectation, told: Told) -> _Pictures:
        values_BNP = pixel_values(expectation, told.pixels)
        parts = (told.targets_BND, told.expected_BND, told.hidden_BN, values_BNP)
        parted = (by_picture(part, expectation.encoder) for part in parts)
        return cls(*on_device(expectation, parted))

    def pooled(self) -> _Pictures:
        mean_MND = self.targets_MND.mean(1, keepdim=True).expand_as(self.targets_MND)
        return _Pictures(mean_MND, mean_MND, torch.zeros_like(self.hidden_MN), self.values_MNP)

    def batch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Returns tokens, which of them are there, and the pixels."""
        draws_2M1 = torch.rand(2, len(rows), 1, generator=generator).to(rows.device)
        hidden_MN = self.hidden_MN[rows]
        whole_M1 = (draws_2M1[0] < WHOLE) | ~hidden_MN.any(1, keepdim=True)
        expected_MN = hidden_MN & ~whole_M1 & (draws_2M1[1] < EXPECTED)
        tokens_MND = torch.where(
            expected_MN[..., None], self.expected_MND[rows], self.targets_MND[rows]
        )
        return tokens_MND, hidden_MN | whole_M1, self.values_MNP[rows]


def _fit(
    decoder: Decoder,
    pictures: _Pictures,
    steps: int,
    seed: int,
    advance: Callable[[], object],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = max(LEAST, TOKENS // pictures.values_MNP.shape[1])
    optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=DECAY)
    decoder.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        rows = torch.randint(len(pictures.values_MNP), (size,), generator=generator)
        batch = pictures.batch(rows.to(pictures.values_MNP.device), generator)
        if isinstance(decoder, FlowDecoder):
            loss = flow_loss(decoder, *batch, generator)
        else:
            loss = regression_loss(decoder, *batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), CLIP)
        optimizer.step()
        advance()
    decoder.eval().requires_grad_(False)


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(WARMUP, max(1, steps // 10)))
    return LR * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
