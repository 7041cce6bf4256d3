"""The kernels' matrix product against the same arithmetic written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.sink_lm.kernels.matrix import KernelMatrix

pytestmark = pytest.mark.usefixtures("kernels")

CASES = {
    "4 bits": (-8, 8, False),
    "4 bits with centre": (-8, 8, True),
    "8 bits": (-128, 128, False),
    "8 bits with centre": (-128, 128, True),
}


def parts(low: int, high: int, has_centre: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random levels, scales, centres and biases of a matrix of 48 outputs and 96 inputs."""
    torch.manual_seed(high)
    centre_OG = torch.randn(48, 3).half().float() * high / 4 * has_centre
    return (
        torch.randint(low, high, (48, 96)).to(torch.int8),
        (torch.rand(48, 3) + 0.1).half().float(),
        centre_OG.half().float(),
        torch.randn(48),
    )


def weight(levels_OI: Tensor, scale_OG: Tensor, centre_OG: Tensor) -> Tensor:
    groups_OG32 = levels_OI.double().unflatten(1, (-1, 32))
    return (groups_OG32 * scale_OG[..., None] + centre_OG[..., None]).flatten(1)


def in_8_bits(x_BI: Tensor) -> Tensor:
    """Every group of 32 in 255 levels of its own."""
    groups_BG32 = x_BI.unflatten(1, (-1, 32))
    step_BG1 = groups_BG32.abs().amax(-1, keepdim=True) / 127
    return ((groups_BG32 / step_BG1).round() * step_BG1).flatten(1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 21])
@pytest.mark.parametrize("case", CASES)
def test_the_product_is_that_of_inputs_in_8_bits(case: str, rows: int) -> None:
    levels_OI, scale_OG, centre_OG, bias_O = parts(*CASES[case])
    x_BI = torch.randn(rows, 96)
    found = KernelMatrix(levels_OI, scale_OG, centre_OG, bias_O)(x_BI)
    # A centre is multiplied by the sum of the inputs before they are rounded.
    levels = in_8_bits(x_BI).double() @ weight(levels_OI, scale_OG, torch.zeros_like(scale_OG)).T
    centres = x_BI.double() @ weight(torch.zeros_like(levels_OI), scale_OG, centre_OG).T
    assert error(found, levels + centres + bias_O) < 1e-6
    exact = x_BI.double() @ weight(levels_OI, scale_OG, centre_OG).T + bias_O
    assert 1e-4 < error(found, exact) < 1e-2
    shifted = x_BI.double() @ weight(levels_OI, scale_OG.roll(1, 0), centre_OG).T + bias_O
    assert error(found, shifted) > 0.05


@pytest.mark.parametrize("case", CASES)
def test_a_row_is_the_same_in_a_batch_alone_and_on_two_threads(case: str) -> None:
    levels_OI, scale_OG, centre_OG, bias_O = parts(*CASES[case])
    matrix = KernelMatrix(levels_OI, scale_OG, centre_OG, bias_O)
    x_BI = torch.randn(15, 96)
    alone = torch.cat([matrix(x_1I) for x_1I in x_BI.split(1)])
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        together = matrix(x_BI)
        torch.set_num_threads(threads)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_zeros_and_numbers_that_are_none_stay_what_they_are(case: str, bad: float) -> None:
    levels_OI, scale_OG, centre_OG, _ = parts(*CASES[case])
    matrix = KernelMatrix(levels_OI, scale_OG, centre_OG)
    assert not matrix(torch.zeros(1, 96)).any()
    broken = torch.zeros(2, 96)
    broken[0, 40] = bad
    found = matrix(broken)
    assert not found[0].isfinite().any()
    assert not found[1].any()


def test_the_type_of_the_inputs_is_that_of_the_outputs() -> None:
    levels_OI, scale_OG, centre_OG, bias_O = parts(*CASES["8 bits"])
    matrix = KernelMatrix(levels_OI, scale_OG, centre_OG, bias_O)
    x_BI = torch.randn(3, 96).bfloat16()
    assert torch.equal(matrix(x_BI), matrix(x_BI.float()).bfloat16())
