"""SIGReg against its formula in fp64, written out here with all of its N x M x T numbers.

Shape legend: N rows, D width, M slices, T knots.
"""

import math

import pytest
import torch
from torch import Tensor

from models.objectives.sigreg import SIGReg, epps_pulley


def reference(z_ND: Tensor, slices_DM: Tensor, knots: int) -> Tensor:
    t_T = torch.tensor([3 * k / (knots - 1) for k in range(knots)], dtype=torch.float64)
    dt = 3 / (knots - 1)
    phi_T = (-t_T.square() / 2).exp()
    ends = torch.tensor([dt, *[2 * dt] * (knots - 2), dt], dtype=torch.float64)
    x_NMT = (z_ND @ slices_DM)[..., None] * t_T
    error_MT = (x_NMT.cos().mean(0) - phi_T) ** 2 + x_NMT.sin().mean(0) ** 2
    return len(z_ND) * (error_MT * ends * phi_T).sum(-1).mean()


def sample(n: int = 300, d: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return z * torch.linspace(0.2, 3, d) + 0.3  # neither centred nor round


@pytest.mark.parametrize("knots", [2, 3, 17])
def test_value_and_gradient_equal_the_formula(knots: int) -> None:
    sigreg = SIGReg(slices=40, knots=knots)
    z, other = sample().requires_grad_(), sample().requires_grad_()
    ours, theirs = sigreg(z), reference(other, sigreg.draw_slices(12).double(), knots)
    ours.backward()
    theirs.backward()
    assert abs(ours / theirs - 1) < 1e-12
    torch.testing.assert_close(z.grad, other.grad, rtol=0, atol=1e-12)
    # The slices of another step give another value.
    sigreg.advance()
    assert abs(sigreg(z) / theirs - 1) > 1e-6


def test_fp32_is_close_to_fp64_and_autocast_changes_nothing() -> None:
    sigreg, z = SIGReg(slices=64), sample(1000)
    exact = reference(z, sigreg.draw_slices(12).double(), 17)
    plain = sigreg(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sigreg(z.float()), plain)
    assert abs(plain / exact - 1) < 1e-5


def test_equal_samples_give_the_closed_form() -> None:
    """If all samples are 0, the statistic is the integral of (1 - phi)^2 phi over [-3, 3]."""
    root = math.sqrt(2 * math.pi)
    terms = [math.erf(3 * math.sqrt(k / 2)) * root / math.sqrt(k) for k in (1, 2, 3)]
    expected = terms[0] - 2 * terms[1] + terms[2]
    found = epps_pulley(torch.zeros(1, 5, dtype=torch.float64), knots=4001)
    torch.testing.assert_close(
        found, torch.full((5,), expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_normal_scores_low_and_everything_else_high() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, 16, generator=generator)
    angle = 2 * torch.pi * torch.rand(1000, generator=generator)
    ring = torch.zeros(1000, 16)
    ring[:, 0], ring[:, 1] = angle.cos(), angle.sin()
    sigreg = SIGReg(slices=256)
    low = sigreg(normal)
    assert low < 2
    others = {
        "collapsed": torch.zeros_like(normal),
        "a line": normal[:, :1].expand(-1, 16),
        "a ring": ring,
        "too wide": 2 * normal,
        "off centre": normal + 0.5,
        "two lumps": normal * 0.1 + normal[:, :1].sign(),
    }
    scores = {name: float(sigreg(rows)) for name, rows in others.items()}
    assert min(scores.values()) > 10 * low, scores


def test_minimising_it_spreads_a_collapsed_sample() -> None:
    torch.manual_seed(0)
    z = (0.01 * torch.randn(128, 4)).requires_grad_()
    sigreg, optimizer = SIGReg(slices=32), torch.optim.Adam([z], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        sigreg(z).backward()
        optimizer.step()
        sigreg.advance()
    torch.testing.assert_close(torch.cov(z.detach().T), torch.eye(4), rtol=0, atol=0.25)


def test_slices_are_unit_and_follow_from_seed_and_step() -> None:
    first = SIGReg(slices=500, seed=3)
    slices = first.draw_slices(8)
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(500))
    # Directions are uniform on the sphere, so none is preferred.
    torch.testing.assert_close(slices @ slices.T / 500, torch.eye(8) / 8, rtol=0, atol=0.03)
    first.advance()
    assert not torch.equal(first.draw_slices(8), slices)
    resumed = SIGReg(slices=500, seed=3)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed.draw_slices(8), first.draw_slices(8))
    other = SIGReg(slices=500, seed=4)
    assert not torch.equal(other.draw_slices(8), slices)


def test_the_backward_pass_keeps_one_number_per_projection() -> None:
    kept: list[int] = []
    z, sigreg = sample(200, 6).float().requires_grad_(), SIGReg(slices=50, knots=17)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sigreg(z)
        ours, kept = sum(kept), []
        reference(z, sigreg.draw_slices(6), 17)
        theirs = sum(kept)
    assert ours < 200 * 50 + 200 * 6 + 20 * 17 * 50
    assert theirs > 10 * ours
