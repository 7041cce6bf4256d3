"""The readout of places: it reads what states hold, and places that are not known do not count."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.planning.games.readout import fit_readout
from pipelines.planning.games.worlds import F32


def walks_in(count: int, seed: int, *, shown: bool = True) -> tuple[list[F32], list[Tensor]]:
    """Walks whose states hold the places, bent and mixed; or noise, unless shown."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(3, 24, generator=torch.Generator().manual_seed(7))
    found, states = [], []
    for _ in range(count):
        places = torch.rand(40, 3, generator=generator) * torch.tensor([900.0, 300.0, 2.0])
        held = (places / torch.tensor([900.0, 300.0, 2.0]) - 0.5) if shown else torch.rand(40, 3)
        states.append(torch.tanh(held @ mixed))
        found.append(places.numpy())
    return found, states


def error(shown: bool, hidden: int = 0) -> Tensor:
    """The mean error of each place on new walks, as a share of its range."""
    walks, states = walks_in(30, 0, shown=shown)
    for walk in walks[:hidden]:
        walk[:, 1] = np.nan
    readout = fit_readout(states, walks, steps=300)
    others, seen = walks_in(10, 1, shown=shown)
    true = torch.from_numpy(np.concatenate(others))
    found = readout(torch.cat(seen))
    assert torch.equal(readout(torch.stack(seen)).flatten(0, 1), found)
    return (found - true).abs().mean(0) / torch.tensor([900.0, 300.0, 2.0])


def test_it_reads_what_states_hold_and_guesses_the_middle_where_they_hold_nothing() -> None:
    assert (error(shown=True) < 0.06).all()
    assert (error(shown=False) > 0.2).all()  # a quarter is the middle's


def test_places_that_are_not_known_do_not_count() -> None:
    assert (error(shown=True, hidden=15) < 0.08).all()


def test_the_same_seed_fits_the_same_and_draws_nothing_of_others() -> None:
    walks, states = walks_in(3, 0)
    torch.manual_seed(5)
    first, drawn = fit_readout(states, walks, steps=5), torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(()))
    assert torch.equal(first(states[0]), fit_readout(states, walks, steps=5)(states[0]))
