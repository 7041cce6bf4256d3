"""The predictor over patches sees the past and never the future, and learns a moving dot."""

from __future__ import annotations

import pytest
import torch

from models.image_size import Grid
from models.planning.world_model.block_causal import BlockCausalPredictor, causal_by_block

GRID, LATENT, ACTIONS, CONTEXT = Grid(2, 3), 4, 2, 5
WIDTH = GRID.tokens * LATENT


def made(context: int = CONTEXT, steps: int = 2) -> BlockCausalPredictor:
    torch.manual_seed(0)
    predictor = BlockCausalPredictor(
        grid=GRID, latent=LATENT, actions=ACTIONS, width=32, depth=2, context=context, steps=steps
    )
    torch.nn.init.normal_(predictor.change.weight, std=0.3)  # else nothing is predicted to change
    return predictor.eval()


def drawn(frames: int = CONTEXT, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, frames, WIDTH, generator=generator),
        torch.randn(rows, frames, ACTIONS, generator=generator),
    )


def test_the_mask_is_causal_by_step_and_full_within_a_step() -> None:
    assert causal_by_block(2, 2).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]


@pytest.mark.parametrize("what", ["frames", "actions"])
@torch.no_grad()
def test_what_comes_later_never_changes_an_earlier_prediction(what: str) -> None:
    predictor, (latents, actions) = made(), drawn()
    before = predictor(latents, actions)
    for step in range(1, CONTEXT):
        changed = {"frames": latents.clone(), "actions": actions.clone()}
        changed[what][:, step:] += 1
        after = predictor(changed["frames"], changed["actions"])
        torch.testing.assert_close(after[:, :step], before[:, :step])
        assert (after[:, step] - before[:, step]).abs().max() > 1e-2
        if step + 1 < CONTEXT:  # and what is changed is seen afterwards, by every later step
            changed[what][:, step + 1 :] -= 1
            later = predictor(changed["frames"], changed["actions"])
            assert ((later - before)[:, step + 1 :].abs().amax((0, 2)) > 1e-4).all()


@torch.no_grad()
def test_without_the_mask_the_future_leaks() -> None:
    """The negative control of the test above."""
    predictor, (latents, actions) = made(), drawn()
    predictor.seen_KK.fill_(True)
    before = predictor(latents, actions)
    latents[:, -1] += 1
    assert (predictor(latents, actions)[:, 0] - before[:, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_every_patch_of_a_step_sees_every_other_and_the_action() -> None:
    predictor, (latents, actions) = made(), drawn(frames=1)
    before = predictor(latents, actions).view(3, GRID.tokens, LATENT)
    moved = latents.clone()
    moved[..., :LATENT] += 1  # the first patch
    for found in (predictor(moved, actions), predictor(latents, actions + 1)):
        change = (found.view(3, GRID.tokens, LATENT) - before)[:, 1:]
        assert (change.abs().amax((0, 2)) > 1e-4).all()


@torch.no_grad()
def test_a_rollout_goes_from_prediction_to_prediction_and_its_context_slides() -> None:
    predictor = made(context=3)
    latents, actions = drawn(frames=5)
    future = predictor.rollout(latents[:, 0], actions)
    frames = [latents[:, 0]]
    for step in range(5):
        first = max(0, step - 2)
        seen = torch.stack(frames[first : step + 1], 1)
        frames.append(predictor(seen, actions[:, first : step + 1])[:, -1])
    torch.testing.assert_close(future, torch.stack(frames[1:], 1))
    other = actions.clone()
    other[:, 3:] += 1
    torch.testing.assert_close(predictor.rollout(latents[:, 0], other)[:, :3], future[:, :3])


@torch.no_grad()
def test_the_loss_is_what_the_equations_say() -> None:
    predictor, (latents, actions) = made(steps=2), drawn()
    errors = predictor.errors(latents, actions[:, :-1])
    assert {name: tuple(e.shape) for name, e in errors.items()} == {
        "prediction": (3, CONTEXT - 1),
        "rollout": (3, 2),
    }
    for t in range(1, CONTEXT):
        found = predictor(latents[:, :t], actions[:, :t])[:, -1]
        expected = (found - latents[:, t]).abs().mean(-1)
        torch.testing.assert_close(errors["prediction"][:, t - 1], expected)
    first = predictor(latents[:, :1], actions[:, :1])[:, 0]
    second = predictor(torch.stack([latents[:, 0], first], 1), actions[:, :2])[:, 1]
    torch.testing.assert_close(errors["rollout"][:, 1], (second - latents[:, 2]).abs().mean(-1))


def test_it_learns_what_actions_do_to_each_patch() -> None:
    """An action shifts every patch by an amount of its own, which only its place tells."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    predictor = BlockCausalPredictor(
        grid=Grid(1, 4), latent=2, actions=1, width=32, depth=2, context=3, steps=2
    )
    optimizer = torch.optim.Adam(predictor.parameters(), 5e-3)
    shifts = torch.tensor([1.0, -1.0, 0.5, 2.0]).repeat_interleave(2)

    def clips(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        actions = torch.randn(count, 3, 1, generator=generator)
        start = torch.randn(count, 1, 8, generator=generator)
        return torch.cat([start, start + (actions * shifts).cumsum(1)], dim=1), actions

    for _ in range(150):
        errors = predictor.errors(*clips(64))
        loss = errors["prediction"].mean() + errors["rollout"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    latents, actions = clips(64)
    still = latents[:, :1].expand(-1, 3, -1)
    with torch.no_grad():
        ours, shuffled = (
            predictor.rollout(latents[:, 0], of) for of in (actions, actions.roll(1, 0))
        )
    wrong, lost, copied = (
        float((found - latents[:, 1:])[:, 1].abs().mean()) for found in (ours, shuffled, still)
    )
    assert wrong < 0.4 * copied < 0.4 * lost


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--objective\.dynamics-width: needs a multiple of 32"):
        BlockCausalPredictor(grid=GRID, latent=4, actions=2, width=48, depth=1, context=2, steps=1)
