"""The attentive probe of frozen tokens, V-JEPA's evaluation, with its whole sweep in one pass.

A learned query attends to all tokens of a clip, a residual MLP follows, then a linear classifier
(Bardes et al. 2024, section 3.3 and appendix D; Chen et al. 2023). A probe of the mean
finds what the average of the tokens holds; this one finds what any single token holds.

Shape suffixes: N clips to learn from, B of one step, T tokens, D width, C classes, P probes of the
sweep, H attention heads, E = D / H.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.evaluation.arrays import Array, as_labels
from pipelines.evaluation.probes.probe import Column, Probe, ProbeTask

# V-JEPA 2's sweep (arXiv 2506.09985, appendix): 20 probes on one pass over the frozen features.
LRS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
WEIGHT_DECAYS = (0.01, 0.1, 0.4, 0.8)
BETAS, EPS, CLIP_NORM = (0.9, 0.999), 1e-8, 1.0
LN_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class AttentiveProbe:
    """The probe that did best on the held-out part, and its accuracy on the test set."""

    accuracy: float
    held_out_accuracy: float
    lr: float
    weight_decay: float
    shift_accuracy: float | None = None


class AttentiveProbes(nn.Module):
    """P independent probes of the same tokens; the first dimension of every weight is P.

    With one query, neither keys nor values need computing for every token: the score q . (K x + b)
    is (K^T q) . x up to a constant that the softmax does not see, and the weighted mean of V x is V
    times the weighted mean of x. That makes twenty probes cheaper than one written out.

    Args:
        count: P.
        width: D.
        heads: H; divides `width`.
        classes: C.
    """

    def __init__(self, count: int, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads

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
        self.head_weight, self.head_bias = normal(width, classes), constant(0, classes)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Logits of all probes, [P, B, C], of frozen tokens."""
        x_BTD = (tokens_BTD.float() - self.mean_D) * self.scale_D
        x_BTD = F.layer_norm(x_BTD, tokens_BTD.shape[-1:], eps=LN_EPS)
        pooled_PBD = self.query[:, None] + self._attend(x_BTD)
        hidden = F.layer_norm(pooled_PBD, pooled_PBD.shape[-1:], eps=LN_EPS)
        hidden = hidden * self.norm_weight[:, None] + self.norm_bias[:, None]
        hidden = F.gelu(torch.baddbmm(self.up_bias[:, None], hidden, self.up_weight))
        pooled_PBD = pooled_PBD + torch.baddbmm(self.down_bias[:, None], hidden, self.down_weight)
        return torch.baddbmm(self.head_bias[:, None], pooled_PBD, self.head_weight)

    @torch.no_grad()
    def standardise(self, tokens: Array) -> None:
        """Sets the scaling that brings these tokens, [N, T, D], to mean 0 and deviation 1."""
        count, total_D, squares_D = 0, torch.zeros(1), torch.zeros(1)
        for rows in np.array_split(np.arange(len(tokens)), math.ceil(len(tokens) / 256)):
            x_MD = _rows(tokens, rows, torch.device("cpu")).double().flatten(0, 1)
            count, total_D = count + len(x_MD), total_D + x_MD.sum(0)
            squares_D = squares_D + x_MD.square().sum(0)
        mean_D = total_D / count
        std_D = (squares_D / count - mean_D.square()).clamp_min(0).sqrt()
        # A dimension that never varies carries no information and stays at zero.
        scale_D = torch.where(std_D > 1e-6 * std_D.max(), 1 / std_D, torch.ones_like(std_D))
        self.mean_D.copy_(mean_D)
        self.scale_D.copy_(scale_D)

    def _attend(self, x_BTD: Tensor) -> Tensor:
        """Returns what each query reads from tokens normalised without affine, [P, B, D]."""
        B, _, D = x_BTD.shape
        P, H = len(self.query), self.heads
        query_PD = torch.einsum("pij,pi->pj", self.q_weight, self.query) + self.q_bias
        keys_PDHE = self.k_weight.view(P, D, H, D // H)
        asks_PHD = torch.einsum("pdhe,phe->phd", keys_PDHE, query_PD.view(P, H, -1))
        asks_PHD = asks_PHD * self.norm_tokens_weight[:, None] / math.sqrt(D // H)
        weights = (x_BTD @ asks_PHD.reshape(P * H, D).T).softmax(dim=1)
        mean_BPHD = (weights.mT @ x_BTD).view(B, P, H, D)
        mean_BPHD = mean_BPHD * self.norm_tokens_weight[:, None] + self.norm_tokens_bias[:, None]
        values_PDHE = self.v_weight.view(P, D, H, D // H)
        read_PBHE = torch.einsum("bphd,pdhe->pbhe", mean_BPHD, values_PDHE)
        return read_PBHE.reshape(P, B, D) + self.v_bias[:, None]


def attentive_probe(
    train: Array,
    train_labels: Array,
    test: Array,
    test_labels: Array,
    *,
    heads: int,
    shifted: tuple[Array, Array] | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    lrs: tuple[float, ...] = LRS,
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS,
    standardise: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AttentiveProbe:
    """Trains a probe for every (lr, weight decay) at once and scores the best of them.

    AdamW, cosine to zero, gradients of each probe clipped at norm 1, as in V-JEPA. V-JEPA reports
    the best probe on the test set; here the best is picked on a held-out part of the training set.

    Args:
        train: [N, T, D] frozen tokens, any floating type; may be a memory map.
        train_labels: [N] class indices from 0.
        test: tokens to score on; test_labels: their classes.
        heads: attention heads.
        shifted: a second test set, scored by the same probe.
        standardise: scale the tokens by training statistics first, as the linear probe does.
        held_out: share of the training set that picks the probe.
        seed: of weights, order and the held-out part.
        device: where probes run.
    """
    labels_N = as_labels(train_labels)
    order = np.random.default_rng(seed).permutation(len(labels_N))
    count = max(1, round(held_out * len(order)))
    grid = [(lr, decay) for lr in lrs for decay in weight_decays]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probes = AttentiveProbes(len(grid), train.shape[-1], heads, int(labels_N.max()) + 1).to(
            device
        )
    fits = np.sort(order[count:])
    if standardise:
        probes.standardise(train)
    batches = _epochs(fits, epochs, batch_size, seed)
    _fit(probes, train, labels_N, grid, list(batches))
    held_P = _accuracy(probes, train, labels_N, np.sort(order[:count]))
    best = int(held_P.argmax())
    test_P = _accuracy(probes, test, as_labels(test_labels), np.arange(len(test)))
    found = AttentiveProbe(float(test_P[best]), float(held_P[best]), *grid[best])
    if shifted is None:
        return found
    tokens, labels = shifted
    shifted_P = _accuracy(probes, tokens, as_labels(labels), np.arange(len(tokens)))
    return dataclasses.replace(found, shift_accuracy=float(shifted_P[best]))


def _epochs(rows: np.ndarray, epochs: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the rows of every step."""
    rng = np.random.default_rng([seed, 1])
    for _ in range(epochs):
        order = rng.permutation(rows)
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def _rows(tokens: Array, rows: np.ndarray, device: torch.device) -> Tensor:
    """Moves some clips' tokens to the device."""
    return torch.as_tensor(tokens[rows]).to(device)


def _fit(
    probes: AttentiveProbes,
    tokens: Array,
    labels_N: Tensor,
    grid: list[tuple[float, float]],
    steps: list[np.ndarray],
) -> None:
    device = probes.query.device
    optimizer = _AdamW(list(probes.parameters()), grid)
    for step, rows in enumerate(steps):
        logits_PBC = probes(_rows(tokens, rows, device))
        labels_B = labels_N[rows].to(device)
        targets_PB = labels_B.expand(len(grid), -1)
        loss = F.cross_entropy(logits_PBC.flatten(0, 1), targets_PB.flatten(), reduction="sum")
        (loss / len(rows)).backward()  # type: ignore[no-untyped-call]
        optimizer.step(0.5 * (1 + math.cos(math.pi * step / len(steps))))


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


@torch.no_grad()
def _accuracy(probes: AttentiveProbes, tokens: Array, labels_N: Tensor, rows: np.ndarray) -> Tensor:
    """Returns the share of rows that each probe classifies correctly, [P]."""
    hits = torch.zeros(len(probes.query))
    for chunk in np.array_split(rows, math.ceil(len(rows) / 256)):
        predicted_PB = probes(_rows(tokens, chunk, probes.query.device)).argmax(-1).cpu()
        hits += (predicted_PB == labels_N[chunk].cpu()).sum(1)
    return hits / len(rows)


def _run(task: ProbeTask) -> dict[str, Any]:
    """Probes the tokens of clips; {} for images, for which no tokens are kept."""
    if task.row not in task.train.tokens:
        return {}
    cfg = task.cfg
    sets = [task.train, task.test, *([] if task.shifted is None else [task.shifted])]
    train, test, *shifted = [(part.tokens[task.row], part.labels_N) for part in sets]
    probe = attentive_probe(
        *train,
        *test,
        shifted=shifted[0] if shifted else None,
        heads=task.heads if train[0].shape[-1] % task.heads == 0 else 1,
        epochs=cfg.attentive_epochs,
        lrs=cfg.attentive_lrs,
        weight_decays=cfg.attentive_decays,
        standardise=cfg.attentive_standardise,
        seed=cfg.seed,
        device=task.device,
    )
    return {"attentive": dataclasses.asdict(probe)}


ATTENTIVE = Probe(
    run=_run,
    columns=(
        Column(
            key="attentive.accuracy",
            name="Attentive probe",
            meaning="Accuracy of a classifier with one learned query that attends to all frozen "
            "tokens of a clip.",
        ),
    ),
)
