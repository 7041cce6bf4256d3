"""Predictors learn on from walks, and nothing else of the model changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from helpers.pipelines.fake_doom import fake_world
from models.objectives.registry import build_objective
from models.planning.world_model.world_model import WorldModel
from pipelines.planning.games.imagination import encode_walk
from pipelines.planning.games.predictors import restated, tuned, with_recurrent_states
from pipelines.planning.games.walks import Walk, walk
from pipelines.recipes.planning import worldmodel_doom


def made(**objective: object) -> WorldModel:
    cfg = worldmodel_doom()
    settings = cfg.objective_settings | {
        **{"latent_width": 8, "dynamics_width": 32, "action_width": 3},
        **{"recurrent_width": 0, "history": 1, "window": 9},
        **objective,
    }
    torch.manual_seed(0)
    built = build_objective("worldmodel", model=cfg.model_settings, objective=settings)
    assert isinstance(built, WorldModel)
    return built.eval().requires_grad_(False)


def walks(count: int) -> list[Walk]:
    player = fake_world().start()
    return [walk(player, seed, 30) for seed in range(count)]


def error(model: WorldModel, states: list[torch.Tensor], found: list[Walk]) -> float:
    """The mean error of the states after five steps."""
    start = torch.stack([one[0] for one in states])
    actions = torch.from_numpy(np.stack([one.actions_TA[:5] for one in found]))
    true = torch.stack([one[5] for one in states])
    return float((model.rollout(start, actions)[0, :, -1] - true).norm(dim=-1).mean())


def test_predictors_learn_on_and_perception_stays() -> None:
    patches = {"predictor": "block_causal", "window": 4}
    for objective, share in (({}, 0.9), ({"history": 2}, 0.9), (patches, 1.0)):
        model, found = made(**objective), walks(12)
        states = [encode_walk(model, one) for one in found]
        better = tuned(model, states, found, 80, seed=0)
        assert error(better, states, found) < share * error(model, states, found), objective
        changed = [n for n, p in better.state_dict().items() if not p.equal(model.state_dict()[n])]
        assert changed
        assert all(name.startswith("predictors.") for name in changed)
        assert not any(p.requires_grad for p in better.parameters())


def test_recurrent_states_are_given_to_a_model_that_has_none_and_learn() -> None:
    model, found = made(), walks(12)
    assert model.told is None
    cfg = worldmodel_doom()
    own = {"latent_width": 8, "dynamics_width": 32, "action_width": 3}
    run = replace(cfg, objective=replace(cfg.objective, recurrent_width=0, history=1, **own))
    fresh, changed = with_recurrent_states(model, run, 6)
    assert (changed.objective.recurrent_width, fresh.told, fresh.history) == (6, 8, 24)
    states = [encode_walk(fresh, one) for one in found]
    seen = [encode_walk(model, one) for one in found]
    torch.testing.assert_close(torch.cat(states)[:, 6:], torch.cat(seen))
    better = tuned(fresh, states, found, 60, seed=0)
    after = [restated(better, one) for one in states]
    torch.testing.assert_close(after[0], encode_walk(better, found[0]))
    assert error(better, after, found) < 0.9 * error(fresh, states, found)
    names = [n for n, p in better.state_dict().items() if not p.equal(fresh.state_dict()[n])]
    assert {name.split(".")[0] for name in names} == {"predictors", "recurrent"}
    assert restated(model, seen[0]) is seen[0]


def test_no_steps_change_nothing() -> None:
    model, found = made(), walks(2)
    assert tuned(model, [encode_walk(model, one) for one in found], found, 0, seed=0) is model
