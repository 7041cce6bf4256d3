"""SIGReg measures how far embeddings are from a standard normal distribution (Balestriero and
LeCun, 2025, *LeJEPA*, arXiv 2511.08544). It is the mean Epps-Pulley statistic of random
one-dimensional projections.

    A            D x M, columns a_m of unit length, drawn anew in every step
    t_k          3 k / (T - 1), phi_k = exp(-t_k^2 / 2), w_k = 2 dt phi_k (half of it at both ends)
    EP(m)        N sum_k w_k [ (mean_n cos(t_k z_n . a_m) - phi_k)^2
                               + (mean_n sin(t_k z_n . a_m))^2 ]
    SIGReg       mean over m of EP(m)

The integral over [-3, 3] is computed over [0, 3] and doubled, because the integrand is symmetric.
The sines and cosines of all knots follow from those of the first knot by the angle-addition
formulas. The backward pass computes them again, so that memory is N x M, whereas autograd through
the formula would keep several tensors of N x M x T.

Shape legend: N rows in this process, D width, M slices, T knots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from models.encoders.from_settings import Settings
from models.keyed_random.streams import StepStream
from models.keyed_random.tensors import mix, normals
from models.objectives.objective import Batch, Objective, Output, WrappedObjective
from models.synced import mean_over_processes, world_size

END = 3.0  # upper limit of the integral
CHUNK_ELEMENTS = 65_536  # elements of N x M processed at a time, few enough for a core's cache


class SIGReg(nn.Module):
    """Computes the statistic; the slices follow from a seed and the number of the step.

    Args:
        slices: M, the number of random directions.
        knots: T, the number of points of the trapezoid rule, at least 2.
        seed: seed of the slices.
    """

    def __init__(self, *, slices: int, knots: int = 17, seed: int = 0) -> None:
        super().__init__()
        self.slices, self.knots, self.seed = slices, knots, seed
        self.step: torch.Tensor
        # As a buffer, the step is saved with the weights and lies on the device, so that drawing
        # slices does not wait for a copy. It is equal in all processes, as all count the same
        # steps.
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def advance(self) -> None:
        """Moves on to new slices; to be called after every optimizer step."""
        self.step += 1

    def forward(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Computes the statistic of the rows of all processes together.

        Args:
            rows_ND: embeddings [N, D]. The computation is in fp64 if they are, otherwise in fp32.

        Returns:
            A scalar. It is about 1 for a standard normal sample, and grows with N for any other.
        """
        with torch.autocast(rows_ND.device.type, enabled=False):
            rows_ND = rows_ND if rows_ND.dtype == torch.float64 else rows_ND.float()
            slices_DM = self.draw_slices(rows_ND.shape[1]).to(rows_ND.dtype)
            scores_M: torch.Tensor = epps_pulley(rows_ND @ slices_DM, self.knots)
            return scores_M.mean()

    def draw_slices(self, width: int) -> torch.Tensor:
        """Returns the directions of this step: float32 [D, M] with columns of unit length."""
        key_1 = mix(self.step ^ mix(torch.full_like(self.step, self.seed)))
        slices_DM = normals(key_1, StepStream.SLICES, width * self.slices).view(width, self.slices)
        return nn.functional.normalize(slices_DM, dim=0)


def sigreg_from_settings(objective: Settings) -> SIGReg:
    """Builds `SIGReg` from the objective settings of a run."""
    seed = objective.get("seed", 0)
    return SIGReg(slices=objective["slices"], knots=objective["knots"], seed=seed)


class Regularized(WrappedObjective):
    """Adds `weight` times SIGReg of one of an objective's features to its loss.

    Everything else is the objective's.

    Args:
        objective: the objective to regularize.
        sigreg: computes the statistic.
        weight: weight of the statistic.
        on: name of the features, one of `objective.regularizable`.

    Raises:
        ValueError: the objective has no features of this name that have a gradient.
    """

    def __init__(self, objective: Objective, sigreg: SIGReg, *, weight: float, on: str) -> None:
        super().__init__(objective)
        if on not in objective.regularizable:
            raise ValueError(
                f"--objective.regularize: {on!r} is no tensor with a gradient that "
                f"{type(objective).__name__} monitors; one of {', '.join(objective.regularizable)}"
            )
        self.sigreg, self.weight, self.on = sigreg, weight, on

    def forward(self, batch: Batch) -> Output:
        """Returns the objective's output with the regularizer added to its loss.

        The unweighted statistic is logged as the metric `regularizer`.
        """
        output: Output = self.objective(batch)
        statistic = self.sigreg(output.monitored[self.on])
        return Output(
            output.loss + self.weight * statistic,
            {**output.metrics, "regularizer": statistic.detach()},
            output.monitored,
        )

    def after_step(self, step: int, total_steps: int) -> None:
        """Calls the objective's `after_step` and draws new slices for the next step."""
        super().after_step(step, total_steps)
        self.sigreg.advance()


def epps_pulley(samples_NM: torch.Tensor, knots: int = 17) -> torch.Tensor:
    """Computes Epps and Pulley's (1983) statistic of every column against the standard normal.

    Args:
        samples_NM: N samples in this process of each of M variables, float32 or float64.
        knots: T, the number of points of the trapezoid rule over [0, 3].

    Returns:
        [M], the statistic of the samples of all processes together.
    """
    t_T = torch.linspace(0, END, knots, dtype=samples_NM.dtype, device=samples_NM.device)
    phi_T = torch.exp(-0.5 * t_T**2)
    weights_T = 2 * END / (knots - 1) * phi_T
    weights_T[0] /= 2
    weights_T[-1] /= 2
    local_2TM: torch.Tensor = _CharacteristicFunction.apply(samples_NM, knots)
    cos_TM, sin_TM = mean_over_processes(local_2TM)
    error_TM = (cos_TM - phi_T[:, None]).square() + sin_TM.square()
    scores_M: torch.Tensor = samples_NM.shape[0] * world_size() * (weights_T @ error_TM)
    return scores_M


class _CharacteristicFunction(torch.autograd.Function):
    """Stacks mean_n cos(t_k x_nm) and mean_n sin(t_k x_nm) as [2, T, M]."""

    @staticmethod
    def forward(ctx: Any, x_NM: torch.Tensor, knots: int) -> torch.Tensor:
        ctx.save_for_backward(x_NM)
        ctx.knots = knots
        sums_2TM = x_NM.new_zeros(2, knots, x_NM.shape[1])
        sums_2TM[0, 0] = x_NM.shape[0]  # cos 0; sin 0 is 0
        for rows in _chunks(x_NM):
            for k, cos, sin in _waves(x_NM[rows], knots):
                sums_2TM[0, k] += cos.sum(0)
                sums_2TM[1, k] += sin.sum(0)
        return sums_2TM / x_NM.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x_NM,) = ctx.saved_tensors
        knots = ctx.knots
        t_T = torch.linspace(0, END, knots, dtype=x_NM.dtype, device=x_NM.device)
        grad_2TM = grads[0] * (t_T / x_NM.shape[0])[:, None]
        grad_NM = torch.zeros_like(x_NM)
        for rows in _chunks(x_NM):
            part = grad_NM[rows]
            for k, cos, sin in _waves(x_NM[rows], knots):
                part.addcmul_(sin, grad_2TM[0, k], value=-1)
                part.addcmul_(cos, grad_2TM[1, k])
        return grad_NM, None


def _chunks(x_NM: torch.Tensor) -> Iterator[slice]:
    # On a GPU there is no such cache, and fewer kernel launches are better.
    size = len(x_NM) if x_NM.is_cuda else max(1, CHUNK_ELEMENTS // x_NM.shape[1])
    for first in range(0, len(x_NM), size):
        yield slice(first, first + size)


def _waves(x_NM: torch.Tensor, knots: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yields (k, cos(t_k x), sin(t_k x)) for k = 1 to T - 1; each step reuses the tensors."""
    angle_NM = x_NM * (END / (knots - 1))
    first_cos, first_sin = angle_NM.cos(), angle_NM.sin()
    cos, sin = first_cos.clone(), first_sin.clone()
    yield 1, cos, sin
    next_cos, next_sin = torch.empty_like(cos), torch.empty_like(sin)
    for k in range(2, knots):
        torch.mul(cos, first_cos, out=next_cos).addcmul_(sin, first_sin, value=-1)
        torch.mul(sin, first_cos, out=next_sin).addcmul_(cos, first_sin)
        cos, next_cos, sin, next_sin = next_cos, cos, next_sin, sin
        yield k, cos, sin
