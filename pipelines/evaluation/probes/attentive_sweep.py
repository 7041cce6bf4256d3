"""Attentive probes of frozen tokens, V-JEPA's evaluation: all settings of a sweep in one pass.

A learned query attends to all tokens of a clip, a residual MLP follows, then a linear layer
(Bardes et al. 2024, section 3.3 and appendix D; Chen et al. 2023). A probe of the mean
finds what the average of the tokens holds; this one finds what any single token holds.

Shape suffixes: N clips to learn from, B of one step, T tokens, D width, C outputs, P probes of the
sweep, H attention heads, E = D / H.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.config.jobs import EvaluateConfig
from pipelines.evaluation.arrays import Array, held_out_split

# V-JEPA 2's sweep (arXiv 2506.09985, appendix): 20 probes on one pass over the frozen features.
LRS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
WEIGHT_DECAYS = (0.01, 0.1, 0.4, 0.8)
BETAS, EPS, CLIP_NORM = (0.9, 0.999), 1e-8, 1.0
LN_EPS = 1e-5

Loss = Callable[[Tensor, np.ndarray], Tensor]
"""Sum over the probes of the mean loss of some rows, from their outputs [P, B, C] and numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Settings of an attentive probe."""

    heads: int
    """Attention heads; they divide the width of the tokens."""
    epochs: int = 20
    batch_size: int = 64
    lrs: tuple[float, ...] = LRS
    """Learning rates; each is tried with each weight decay."""
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS
    standardise: bool = False
    """Scale the tokens by training statistics first, as the linear probe does."""
    held_out: float = 0.1
    """Share of the training set that picks the probe."""
    seed: int = 0
    """Fixes weights, order and the held-out part."""

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each probe."""
        return [(lr, decay) for lr in self.lrs for decay in self.weight_decays]


def sweep_of(cfg: EvaluateConfig, heads: int, width: int) -> Sweep:
    """Returns the settings of a job for tokens of a width, which may be too odd for its heads."""
    return Sweep(
        heads=heads if width % heads == 0 else 1,
        epochs=cfg.attentive_epochs,
        lrs=cfg.attentive_lrs,
        weight_decays=cfg.attentive_decays,
        standardise=cfg.attentive_standardise,
        seed=cfg.seed,
    )


class AttentiveProbes(nn.Module):
    """P independent probes of the same tokens; the first dimension of every weight is P.

    With one query, neither keys nor values need computing for every token: the score q . (K x + b)
    is (K^T q) . x up to a constant that the softmax does not see, and the weighted mean of V x is V
    times the weighted mean of x. That makes twenty probes cheaper than one written out.

    Args:
        count: P.
        width: D.
        heads: H; divides `width`.
        outputs: C.
    """

    def __init__(self, count: int, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads, self.outputs = heads, outputs

        def normal(*shape: int) -> nn.Parameter:
            # The same start for every probe, so that only the settings differ.
            values = nn.init.trunc_normal_(torch.empty(1, *shape), std=0.02)
            return nn.Parameter(values.repeat(count, *(1 for _ in shape)))

        def constant(value: float, size: int) -> nn.Parameter:
            return nn.Parameter(torch.full((count, size), float(value)))

        self.mean_D: Tensor
        self.scale_D: Tensor
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("scale_D", torch.ones(width))
        self.query = normal(width)
        self.norm_tokens_weight, self.norm_tokens_bias = constant(1, width), constant(0, width)
        self.q_weight, self.q_bias = normal(width, width), constant(0, width)
        self.k_weight = normal(width, width)
        self.v_weight, self.v_bias = normal(width, width), constant(0, width)
        self.norm_weight, self.norm_bias = constant(1, width), constant(0, width)
        self.up_weight, self.up_bias = normal(width, 4 * width), constant(0, 4 * width)
        self.down_weight, self.down_bias = normal(4 * width, width), constant(0, width)
        self.head_weight, self.head_bias = normal(width, outputs), constant(0, outputs)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Outputs of all probes, [P, B, C], for frozen tokens; one that is NaN is not there."""
        pooled_PBD = self.query[:, None] + self._attend(*self._normed(tokens_BTD))
        hidden = F.layer_norm(pooled_PBD, pooled_PBD.shape[-1:], eps=LN_EPS)
        hidden = hidden * self.norm_weight[:, None] + self.norm_bias[:, None]
        hidden = F.gelu(torch.baddbmm(self.up_bias[:, None], hidden, self.up_weight))
        pooled_PBD = pooled_PBD + torch.baddbmm(self.down_bias[:, None], hidden, self.down_weight)
        return torch.baddbmm(self.head_bias[:, None], pooled_PBD, self.head_weight)

    @torch.no_grad()
    def standardise(self, tokens: Array) -> None:
        """Sets the scaling that brings these tokens, [N, T, D], to mean 0 and deviation 1.

        Tokens that are NaN are not counted.
        """
        count, total_D, squares_D = 0, torch.zeros(1), torch.zeros(1)
        for rows in np.array_split(np.arange(len(tokens)), math.ceil(len(tokens) / 256)):
            x_MD = _rows(tokens, rows, torch.device("cpu")).double().flatten(0, 1)
            x_MD = x_MD[~x_MD[:, 0].isnan()]
            count, total_D = count + len(x_MD), total_D + x_MD.sum(0)
            squares_D = squares_D + x_MD.square().sum(0)
        mean_D = total_D / count
        std_D = (squares_D / count - mean_D.square()).clamp_min(0).sqrt()
        # A dimension that never varies carries no information and stays at zero.
        scale_D = torch.where(std_D > 1e-6 * std_D.max(), 1 / std_D, torch.ones_like(std_D))
        self.mean_D.copy_(mean_D)
        self.scale_D.copy_(scale_D)

    def attention(self, tokens_BTD: Tensor) -> Tensor:
        """Attention weights of all probes on frozen tokens, [P, B, H, T]; they sum to 1 over T."""
        weights = self._weights(*self._normed(tokens_BTD))
        return weights.view(*weights.shape[:2], len(self.query), self.heads).permute(2, 0, 3, 1)

    def _normed(self, tokens_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Normalises tokens without affine; returns them and which are missing, bool [B, T]."""
        x_BTD = (tokens_BTD.float().nan_to_num(0) - self.mean_D) * self.scale_D
        x_BTD = F.layer_norm(x_BTD, tokens_BTD.shape[-1:], eps=LN_EPS)
        return x_BTD, tokens_BTD[..., 0].isnan()

    def _weights(self, x_BTD: Tensor, missing_BT: Tensor) -> Tensor:
        """Returns attention weights on normalised tokens, [B, T, P * H]."""
        P, D, H = *self.query.shape, self.heads
        query_PD = torch.einsum("pij,pi->pj", self.q_weight, self.query) + self.q_bias
        keys_PDHE = self.k_weight.view(P, D, H, D // H)
        asks_PHD = torch.einsum("pdhe,phe->phd", keys_PDHE, query_PD.view(P, H, -1))
        asks_PHD = asks_PHD * self.norm_tokens_weight[:, None] / math.sqrt(D // H)
        scores: Tensor = x_BTD @ asks_PHD.reshape(P * H, D).T
        return scores.masked_fill(missing_BT[..., None], float("-inf")).softmax(dim=1)

    def _attend(self, x_BTD: Tensor, missing_BT: Tensor) -> Tensor:
        """Returns what each query reads from normalised tokens, [P, B, D]."""
        B, _, D = x_BTD.shape
        P, H = len(self.query), self.heads
        mean_BPHD = (self._weights(x_BTD, missing_BT).mT @ x_BTD).view(B, P, H, D)
        mean_BPHD = mean_BPHD * self.norm_tokens_weight[:, None] + self.norm_tokens_bias[:, None]
        values_PDHE = self.v_weight.view(P, D, H, D // H)
        read_PBHE = torch.einsum("bphd,pdhe->pbhe", mean_BPHD, values_PDHE)
        return read_PBHE.reshape(P, B, D) + self.v_bias[:, None]


def train_sweep(
    sweep: Sweep, train: Array, outputs: int, loss: Loss, device: torch.device | str
) -> tuple[AttentiveProbes, np.ndarray]:
    """Trains a probe for every (lr, weight decay) at once.

    AdamW, cosine to zero, gradients of each probe clipped at norm 1, as in V-JEPA.

    Args:
        sweep: the settings.
        train: [N, T, D] frozen tokens, any floating type; may be a memory map.
        outputs: C.
        loss: what is minimised.
        device: where probes run.

    Returns:
        The probes and the rows of the training set that none of them saw.
    """
    picks, fits = held_out_split(len(train), sweep.held_out, sweep.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sweep.seed)
        probes = AttentiveProbes(len(sweep.grid), train.shape[-1], sweep.heads, outputs).to(device)
    if sweep.standardise:
        probes.standardise(train)
    steps = list(_epochs(np.sort(fits), sweep))
    optimizer = _AdamW(list(probes.parameters()), sweep.grid)
    for step, rows in enumerate(steps):
        total = loss(probes(_rows(train, rows, probes.query.device)), rows)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step(0.5 * (1 + math.cos(math.pi * step / len(steps))))
    return probes, np.sort(picks)


@torch.no_grad()
def read_tokens(
    probes: AttentiveProbes,
    tokens: Array,
    reduce: Callable[[Tensor], Tensor],
    rows: np.ndarray | None = None,
) -> Tensor:
    """Reads some rows of tokens, or all, by every probe.

    Args:
        probes: trained probes.
        tokens: [N, T, D].
        reduce: makes what is kept, [P, B], of the outputs [P, B, C].
        rows: numbers of the rows to read, in this order.

    Returns:
        What `reduce` made of all rows, on the CPU, [P, Q].
    """
    rows = np.arange(len(tokens)) if rows is None else rows
    chunks = np.array_split(rows, math.ceil(len(rows) / 256))
    device = probes.query.device
    return torch.cat([reduce(probes(_rows(tokens, chunk, device))).cpu() for chunk in chunks], 1)


def _epochs(rows: np.ndarray, sweep: Sweep) -> Iterator[np.ndarray]:
    """Yields the rows of every step."""
    rng = np.random.default_rng([sweep.seed, 1])
    for _ in range(sweep.epochs):
        order = rng.permutation(rows)
        yield from (order[i : i + sweep.batch_size] for i in range(0, len(order), sweep.batch_size))


def _rows(tokens: Array, rows: np.ndarray, device: torch.device) -> Tensor:
    """Moves some clips' tokens to the device."""
    return torch.as_tensor(tokens[rows]).to(device)


class _AdamW:
    """AdamW (Loshchilov and Hutter 2019) with rate, decay and clipping of each probe's own."""

    def __init__(self, parameters: list[nn.Parameter], grid: list[tuple[float, float]]) -> None:
        self.parameters = parameters
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.lr_P, self.decay_P = torch.tensor(grid, device=parameters[0].device).unbind(1)
        self.steps = 0

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """Updates all probes and clears their gradients."""
        self.steps += 1
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm_P = sum(g.flatten(1).square().sum(1) for g in gradients) ** 0.5
        shrink_P = (CLIP_NORM / (norm_P + 1e-6)).clamp_max(1)
        corrections = [1 - beta**self.steps for beta in BETAS]
        for p, gradient, (first, second) in zip(
            self.parameters, gradients, self.moments, strict=True
        ):
            each = (-1,) + (1,) * (p.ndim - 1)
            gradient.mul_(shrink_P.view(each))
            first.lerp_(gradient, 1 - BETAS[0])
            second.lerp_(gradient.square(), 1 - BETAS[1])
            lr = lr_scale * self.lr_P.view(each)
            p.mul_(1 - lr * self.decay_P.view(each))
            p.sub_(lr * (first / corrections[0]) / ((second / corrections[1]).sqrt() + EPS))
            p.grad = None
