"""The world model's loss against the equations, what does not count, and what it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.objectives.registry import build_objective
from models.planning.world_model.perception import Keypoints
from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.recipes.planning import worldmodel_tworooms


def made(**objective: Any) -> WorldModel:
    cfg = PretrainConfig(
        model=ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8),
        objective=ObjectiveConfig(
            name="worldmodel", **{"window": 5, "latent_width": 8} | objective
        ),
        data=worldmodel_tworooms().data,
    )
    torch.manual_seed(0)
    built = build_objective(
        "worldmodel", model=cfg.model_settings, objective=cfg.objective_settings
    )
    assert isinstance(built, WorldModel)
    return built


def walks(count: int, steps: int, seed: int = 0) -> dict[str, Tensor]:
    world = TwoRooms()
    places, actions = world.random_walk(count, steps, torch.Generator().manual_seed(seed))
    frames = world.render(places.flatten(0, 1)).view(count, steps + 1, 3, 32, 32)
    return {"clips": frames.transpose(1, 2), "actions": actions}


def test_the_loss_is_what_the_equations_say() -> None:
    model = made(isotropy_weight=0.5, ensemble=2, slices=16)
    for member in model.predictors:
        torch.nn.init.normal_(member.change.weight, std=0.1)  # else nothing is predicted to change
    batch = walks(6, 4)
    output = model(batch)
    frames = batch["clips"].transpose(1, 2).float() / 255
    pixels = (frames - torch.tensor(ModelConfig().mean).view(3, 1, 1)) / torch.tensor(
        ModelConfig().std
    ).view(3, 1, 1)
    z = torch.stack([model.perception(pixels[:, t]) for t in range(5)], 1)
    errors = []
    for member in model.predictors:
        imagined = z[:, 0]
        for t in range(4):
            imagined = member(imagined, batch["actions"][:, t])
            errors.append((imagined - z[:, t + 1]).square().mean())
    expected = {
        "prediction": torch.stack(errors).mean(),
        "smoothness": (z[:, 1:] - z[:, :-1]).square().mean(),
        "inverse": torch.stack(
            [
                (model.inverse(torch.cat([z[:, t], z[:, t + 1]], 1)) - batch["actions"][:, t])
                .square()
                .mean()
                for t in range(4)
            ]
        ).mean(),
        "isotropy": torch.stack([model.sigreg(z[:, t]) for t in range(5)]).mean(),
        "variance": torch.stack(
            [(1 - (z[:, t].var(0) + 1e-4).sqrt()).clamp(min=0).mean() for t in range(5)]
        ).mean(),
        "covariance": torch.stack(
            [(c := torch.cov(z[:, t].T)).square().sum() - c.diagonal().square().sum()
             for t in range(5)]
        ).mean() / 8,
    }  # fmt: skip
    assert output.metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.metrics[name], value.detach(), msg=name)
    weights = {"isotropy": 0.5, "variance": 16, "covariance": 8, "smoothness": 12}
    total = sum(weights.get(name, 1) * value for name, value in expected.items())
    torch.testing.assert_close(output.loss, total)


def test_steps_after_the_end_of_a_segment_do_not_count() -> None:
    model, batch = made(perception="vit", variance_weight=0, covariance_weight=0), walks(4, 4)
    torch.nn.init.normal_(model.predictors[0].change.weight, std=0.1)
    batch["actions"][1, 2:] = torch.nan
    loss = model(batch).loss
    assert loss.isfinite()
    changed = {name: value.clone() for name, value in batch.items()}
    changed["clips"][1, :, 3:] = 0
    torch.testing.assert_close(model(changed).loss, loss)
    changed["clips"][1, :, 2] = 0
    before, after = (float(model(b).metrics["smoothness"]) for b in (batch, changed))
    assert after > 1.01 * before  # that frame was still real


def test_before_training_it_imagines_that_nothing_changes() -> None:
    model = made(ensemble=3)
    latents = torch.randn(5, 8)
    imagined = model.rollout(latents, torch.randn(5, 4, 2))
    assert imagined.shape == (3, 5, 4, 8)
    assert torch.equal(imagined, latents[None, :, None].expand_as(imagined))


@pytest.mark.parametrize("perception", ["keypoints", "vit"])
def test_either_perception_encodes_frames_and_gets_gradients(perception: str) -> None:
    model = made(perception=perception)
    output = model(walks(4, 4))
    output.loss.backward()
    assert model.encode(walks(3, 1)["clips"][:, :, 0]).shape == (3, 8)
    assert output.monitored["latent"].shape == (20, 8)
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_keypoints_say_where_a_blob_is() -> None:
    keypoints = Keypoints(4)
    maps = torch.full((1, 2, 16, 16), -50.0)
    maps[0, 0, 4, 12] = maps[0, 1, 15, 0] = 50.0
    keypoints.maps, keypoints.mixed = torch.nn.Identity(), torch.nn.Identity()
    found = keypoints(maps)[0]
    expected = torch.tensor([12 / 7.5 - 1, 4 / 7.5 - 1, -1, 1])  # x and y of each, in [-1, 1]
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"--objective\.latent-width"):
        Keypoints(5)


def trained(steps: int, **objective: Any) -> tuple[WorldModel, list[float]]:
    model = made(latent_width=16, dynamics_width=32, **objective)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(steps):
        output = model(walks(16, 4, seed=step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.metrics["prediction"]))
    return model, losses


def spread(model: WorldModel) -> float:
    with torch.no_grad():
        return float(model.encode(walks(256, 1, seed=99)["clips"][:, :, 0]).std(0).mean())


def test_without_a_regulariser_the_latents_collapse_and_with_one_they_do_not() -> None:
    none = {f"{name}_weight": 0.0 for name in ("variance", "covariance", "smoothness", "inverse")}
    collapsed, kept = trained(60, **none)[0], trained(60)[0]
    assert spread(collapsed) < 0.01
    assert spread(kept) > 0.1


@pytest.mark.parametrize("predictor", ["pooled", "block_causal"])
@pytest.mark.parametrize("perception", ["conv", "vit"])
def test_latents_of_patches_or_frames_get_gradients(perception: str, predictor: str) -> None:
    model = made(perception=perception, predictor=predictor, dynamics_width=32)
    output = model(walks(4, 4))
    output.loss.backward()
    patches = 16 if predictor == "block_causal" else 1
    assert model.encode(walks(3, 1)["clips"][:, :, 0]).shape == (3, patches * 8)
    assert output.monitored["latent"].shape == (20 * patches, 8)
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # Before training the change is zero, and so are the gradients of what leads to it, not None.
    assert not without
    assert ("rollout" in output.metrics) == (predictor == "block_causal")


def test_patches_are_rows_of_the_regularisers() -> None:
    model, batch = made(perception="conv", predictor="block_causal", dynamics_width=32), walks(5, 4)
    rows = [
        model.encode(frame).view(5 * 16, 8) for frame in batch["clips"].transpose(1, 2).unbind(1)
    ]
    expected = torch.stack([(1 - (z.var(0) + 1e-4).sqrt()).clamp(min=0).mean() for z in rows])
    torch.testing.assert_close(model(batch).metrics["variance"], expected.mean().detach())


def test_a_state_is_the_latents_of_the_last_frames() -> None:
    model, batch = made(history=3), walks(4, 4)
    torch.nn.init.normal_(model.predictors[0].change.weight, std=0.1)
    frames = batch["clips"].transpose(1, 2)
    stacked = model.encode(frames[:, 1:4].flatten(1, 2))
    alone = [model.encode(frames[:, t]) for t in (1, 2, 3)]
    for place, one in enumerate(alone):
        # A single frame stands for one in which nothing moves.
        torch.testing.assert_close(one, one[:, :8].repeat(1, 3))
        torch.testing.assert_close(stacked[:, 8 * place : 8 * place + 8], one[:, :8])
    future = model.rollout(stacked, batch["actions"][:, :2])[0]
    torch.testing.assert_close(future[:, 0, :16], stacked[:, 8:])
    torch.testing.assert_close(future[:, 1, :16], future[:, 0, 8:])
    moved = torch.cat([stacked[:, :8] + 1, stacked[:, 8:]], 1)  # the oldest frame counts too
    assert not torch.allclose(model.rollout(moved, batch["actions"][:, :2])[0, :, 0, 16:],
                              future[:, 0, 16:])  # fmt: skip


def test_with_a_history_the_loss_counts_from_the_first_whole_state() -> None:
    model, batch = made(history=3), walks(6, 4)
    torch.nn.init.normal_(model.predictors[0].change.weight, std=0.1)
    z = torch.stack([model.encode(f)[:, :8] for f in batch["clips"].transpose(1, 2).unbind(1)], 1)
    state, errors = z[:, :3].flatten(1), []
    for t in (2, 3):
        state = model.predictors[0](state, batch["actions"][:, t])
        errors.append((state[:, -8:] - z[:, t + 1]).square().mean())
    expected = torch.stack(errors).mean().detach()
    torch.testing.assert_close(model(batch).metrics["prediction"], expected)
    batch["actions"][2, 3] = torch.nan  # that clip ends before its last frame
    batch["clips"][2, :, 4] = 255 - batch["clips"][2, :, 4]
    counted = torch.ones(6, 2, dtype=torch.bool)
    counted[2, 1] = False
    z = torch.stack([model.encode(f)[:, :8] for f in batch["clips"].transpose(1, 2).unbind(1)], 1)
    future = model.rollout(z[:, :3].flatten(1), batch["actions"][:, 2:].nan_to_num())[0]
    wrong = (future[..., -8:] - z[:, 3:]).square().mean(-1)[counted].mean()
    torch.testing.assert_close(model(batch).metrics["prediction"], wrong.detach())
