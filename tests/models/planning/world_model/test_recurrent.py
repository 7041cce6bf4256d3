"""Recurrent states: what the loss counts, what a state is made of, and what only they can tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.planning.descent import descend
from models.planning.world_model.predictor import Dynamics, LatentPredictor
from models.planning.world_model.recurrent import RecurrentPredictor, RecurrentStates
from pipelines.config.objectives import ObjectiveConfig
from tests.models.planning.world_model.test_world_model import made, walks

OWN = {"recurrent_width": 6, "history": 4, "rollout_steps": 2}


def test_the_loss_is_that_of_rollouts_one_after_the_other() -> None:
    model, batch = made(**OWN), walks(5, 4)
    (member,) = model.predictors
    assert isinstance(member, RecurrentPredictor)
    torch.nn.init.normal_(member.next.change.weight, std=0.1)
    frames = batch["clips"].transpose(1, 2)
    z = torch.stack([model._perceive(one) for one in frames.unbind(1)], 1)
    assert model.recurrent is not None
    state = torch.cat([model.recurrent.gru(z)[0], z], -1)
    latent, recurrent = [], []
    for first in (0, 2):
        imagined = state[:, first]
        for t in (first, first + 1):
            imagined = member.next(imagined, batch["actions"][:, t])
            wrong = (imagined - state[:, t + 1]).square()
            recurrent.append(wrong[:, :6].mean())
            latent.append(wrong[:, 6:].mean())
    found = model(batch).metrics
    torch.testing.assert_close(found["prediction"], torch.stack(latent).mean().detach())
    torch.testing.assert_close(found["recurrent"], torch.stack(recurrent).mean().detach())
    rows = z.flatten(0, 1)
    spread = (1 - (rows.var(0) + 1e-4).sqrt()).clamp(min=0).mean()
    torch.testing.assert_close(found["variance"], spread.detach())


def test_the_recurrent_part_is_no_target_that_moves_towards_its_prediction() -> None:
    member = RecurrentPredictor(latent=2, recurrent=3, actions=1, width=8, depth=1, steps=2)
    states = torch.randn(4, 3, 5, requires_grad=True)
    member.errors(states, torch.randn(4, 2, 1))["recurrent"].mean().backward()
    assert states.grad is not None
    assert states.grad[:, 0].abs().sum() > 0  # where imagination starts
    assert not states.grad[:, 1:].any()


def test_a_state_is_made_of_the_last_frames_without_those_that_repeat_the_first() -> None:
    model = made(**OWN)
    frames = walks(2, 4)["clips"].transpose(1, 2)
    states = torch.stack([model.walk(one) for one in frames])
    assert states.shape == (2, 5, 6 + 8)
    torch.testing.assert_close(model.encode(frames[:, :4].flatten(1, 2)), states[:, 3])
    torch.testing.assert_close(model.encode(frames[:, 0]), states[:, 0])
    padded = torch.cat([frames[:, :1], frames[:, :1], frames[:, :2]], 1)
    torch.testing.assert_close(model.encode(padded.flatten(1, 2)), states[:, 1])
    other = torch.cat([frames[:, 1:2], frames[:, :3]], 1)  # another past is another state
    assert not torch.allclose(model.encode(other.flatten(1, 2)), states[:, 2], atol=1e-3)


def moving(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of things that move on by themselves, each by a way of its own; actions do nothing."""
    start = torch.randn(count, 1, 2, generator=generator)
    way = torch.randn(count, 1, 2, generator=generator)
    return start + way * torch.arange(7)[:, None] / 3, torch.zeros(count, 6, 1)


def learnt(states: RecurrentStates | None, member: Dynamics) -> float:
    """The error of the last step after training, imagined from the frame before it."""
    generator = torch.Generator().manual_seed(0)

    def errors() -> Tensor:
        latents, actions = moving(64, generator)
        seen = latents if states is None else states(latents)
        return member.errors(seen, actions)["prediction"]

    parts = [one for one in (states, member) if one is not None]
    weights = [weight for one in parts for weight in one.parameters()]
    for _ in descend(weights, lambda: errors().mean(), steps=250, lr=5e-3):
        pass
    return float(errors()[:, -1].mean().detach())


def test_only_a_state_of_more_than_one_frame_tells_how_things_move() -> None:
    torch.manual_seed(0)
    own = {"latent": 2, "actions": 1, "width": 32, "depth": 1}
    recurrent = RecurrentPredictor(recurrent=16, steps=1, **own)
    # A frame tells nothing of the way, whose mean square is 1/9.
    alone = LatentPredictor(**own)
    assert learnt(RecurrentStates(2, 16), recurrent) < 0.03
    assert learnt(None, alone) > 0.08


def test_settings_that_do_not_fit_are_refused() -> None:
    for wrong, told in (
        ({"recurrent_width": 8}, "--objective.recurrent-width"),
        ({"recurrent_width": -1}, "--objective.recurrent-width"),
        ({"recurrent_width": 8, "history": 2, "rollout_steps": 9}, "--objective.rollout-steps"),
        (
            {"recurrent_width": 8, "predictor": "block_causal", "perception": "conv",
             "history": 2, "dynamics_width": 32},
            "--objective.history",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            ObjectiveConfig(name="worldmodel", window=9, **wrong)
