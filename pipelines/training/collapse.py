"""Detects a collapsed encoder by RankMe, spread and cosine, gathered without a host sync.

Shape suffixes: B local batch, N rows, D feature width.

JEPA losses do not say whether a run is healthy: they fall when the encoder collapses and may rise
while it learns. These metrics do. RankMe is from Garrido et al. 2023 (arXiv 2210.02885), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.config.train import WatchConfig
from pipelines.evaluation.ranks import effective_rank


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sums `values` in place over the training processes and returns them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class MeanMeter:
    """Running means of scalar tensors, kept on their device until asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0.0

    def update(self, values: dict[str, Tensor]) -> None:
        """Adds one step's scalars; no host sync."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1

    def reading(self) -> dict[str, float]:
        """Returns the means over steps and processes since the last reading, and resets."""
        if not self._count:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        total = torch.full_like(sums[:1], self._count)
        *means, count = all_reduce_sum(torch.cat([sums, total])).tolist()
        self._sums, self._count = {}, 0.0
        return {name: mean / count for name, mean in zip(names, means, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps so that the next reading is the uninterrupted run's."""
        count = torch.tensor(self._count, dtype=torch.float64)
        return {"count": count, **{f"sum.{name}": s.clone() for name, s in self._sums.items()}}

    def load(self, states: Iterable[dict[str, Tensor]], device: torch.device) -> None:
        """Takes over the sums of one or several processes' `state`."""
        self._sums, self._count = {}, 0.0
        for state in states:
            self._count += float(state["count"])
            for key, value in state.items():
                name = key.removeprefix("sum.")
                if key != "count":
                    value = value.to(device)
                    self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reweigh(self, before: int, now: int) -> None:
        """Makes steps that are in the sums weigh as much as those to come.

        Args:
            before: Updates that all processes together made in one step, when the sums were made.
            now: Updates that they make now.
        """
        if before != now:
            self._sums = {name: value * (now / before) for name, value in self._sums.items()}
            self._count *= now / before


class CollapseWatch:
    """Accumulates moments of a [B, D] feature and judges whether it has collapsed.

    Spread and cosine are computed within each update (the rows of one step on one process). A
    collapsed encoder maps all images to one vector, but that vector moves with every step; computed
    across steps, this drift would look like variety.

    Metrics of the encoder's features are named `rankme` and so on; those of another feature are
    prefixed with its name, as in `embedded_rankme`.

    Everything is computed in fp64: close to collapse the variance is a small difference of large
    numbers, which fp32 would lose. This costs D*D*B multiply-adds per step, which is little
    compared with the encoder.
    """

    def __init__(
        self,
        cfg: WatchConfig,
        dim: int,
        device: torch.device | str = "cpu",
        *,
        of: str = "target_pooled",
    ) -> None:
        self.cfg, self._dim = cfg, dim
        self._of_encoder = of == "target_pooled"
        self._prefix = "" if self._of_encoder else f"{of}_"
        self.strikes = 0
        """Number of consecutive readings that looked collapsed."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._moments = {
            "counts": zeros(3),  # rows, updates, ordered pairs of different rows in one update
            "pair_sum": zeros(1),  # of the cosines of those pairs
            "gram": zeros(dim, dim),  # sum over rows of x x^T
            "means": zeros(dim, dim),  # sum over updates of B mean mean^T
        }

    def update(self, pooled_BD: Tensor) -> None:
        """Adds the first `dim` columns of one step's rows; no host sync."""
        pooled_BD = pooled_BD.detach()[:, : self._dim].double()
        rows = pooled_BD.shape[0]
        sum_D = pooled_BD.sum(dim=0)
        unit_sum_D = torch.nn.functional.normalize(pooled_BD, dim=1).sum(dim=0)
        moments = self._moments
        for index, count in enumerate((rows, 1, rows * (rows - 1))):
            moments["counts"][index] += count
        moments["pair_sum"] += unit_sum_D @ unit_sum_D - rows
        moments["gram"].addmm_(pooled_BD.T, pooled_BD)
        moments["means"].addr_(sum_D, sum_D, alpha=1 / rows)

    def reading(self) -> dict[str, float]:
        """Returns the metrics over all processes since the last reading, and resets.

        Returns:
            `rankme` as in the paper (uncentred, over all rows), `rankme_centred` and `std` (mean
            per-dimension standard deviation) of the features centred within each update, and
            `cosine` (mean over pairs of different rows within an update). Empty if there were no
            such pairs.
        """
        packed = all_reduce_sum(torch.cat([m.flatten() for m in self._moments.values()])).cpu()
        parts = torch.split(packed, [m.numel() for m in self._moments.values()])
        shapes = [m.shape for m in self._moments.values()]
        counts, pair_sum, gram_DD, means_DD = (
            part.view(shape) for part, shape in zip(parts, shapes, strict=True)
        )
        self._reset()
        rows, updates, pairs = counts.tolist()
        if not pairs:
            return {}
        scatter_DD = gram_DD - means_DD
        variance_D = (scatter_DD.diagonal() / (rows - updates)).clamp(min=0)
        # A smaller scatter is the rounding noise of equal fp32 rows, whose rank would look high.
        is_noise = scatter_DD.trace() <= 1e-12 * gram_DD.trace()
        found = {
            "rankme": _rankme_of_gram(gram_DD),
            "rankme_centred": 1.0 if is_noise else _rankme_of_gram(scatter_DD),
            "std": float(variance_D.sqrt().mean()),
            "cosine": float(pair_sum) / pairs,
        }
        return {self._prefix + name: value for name, value in found.items()}

    def _reset(self) -> None:
        for moment in self._moments.values():
            moment.zero_()

    def judge(self, reading: dict[str, float], step: int) -> str | None:
        """Counts a reading as good or bad, and says what is wrong after too many bad ones in a row.

        Returns:
            None while all is well; else sentences that name the metric, the flag whose bound it
            crossed, the step, and what to try.
        """
        if not reading or step <= self.cfg.grace_steps:
            return None
        crossed = self._crossed(reading)
        self.strikes = self.strikes + 1 if crossed else 0
        if not crossed or self.strikes < self.cfg.patience:
            return None
        subject = "encoder has" if self._of_encoder else "embeddings have"
        return (
            f"the {subject} collapsed at step {step}: {'; '.join(crossed)} "
            f"({self.strikes} readings in a row). Try a lower --optim.lr, a longer "
            "--optim.warmup-steps, --objective.target ema or, of lejepa, a larger "
            "--objective.sigreg-weight; --watch.action warn goes on regardless."
        )

    def _crossed(self, reading: dict[str, float]) -> list[str]:
        cfg = self.cfg
        least = ("min-std", cfg.min_std)
        if not self._of_encoder:
            least = ("min-embedded-std", cfg.min_embedded_std)
        rank, std = "RankMe of the centred features", "mean per-dimension standard deviation"
        bounds = [
            ("rankme_centred", rank, "below", "min-rankme", cfg.min_rankme),
            ("std", std, "below", *least),
            ("cosine", "mean pairwise cosine", "above", "max-cosine", cfg.max_cosine),
        ]
        crossed = []
        for key, name, side, flag, bound in bounds:
            value = reading[self._prefix + key]
            bad = value < bound if side == "below" else value > bound
            if bad or not math.isfinite(value):
                crossed.append(f"{name} {value:.5g} is not within --watch.{flag} {bound:g}")
        return crossed

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps so that the next reading is the uninterrupted run's."""
        return {name: moment.clone() for name, moment in self._moments.items()}

    def load(self, states: Iterable[dict[str, Tensor]]) -> None:
        """Takes over the moments of one or several processes' `state`."""
        self._reset()
        for state in states:
            for name, moment in self._moments.items():
                moment += state[name].to(moment.device)


def _rankme_of_gram(gram_DD: Tensor) -> float:
    if not torch.isfinite(gram_DD).all():
        return float("nan")
    return effective_rank(torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt())
