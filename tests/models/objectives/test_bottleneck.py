"""Targets standardised over the batch, a predictor that reads the mean, and weights by fan-in.

Shape legend: B clips, N tokens, K context tokens, T target tokens, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch

from models.encoders.kept_tokens import KeptTokens
from models.encoders.positions import Grid
from models.encoders.predictor import Predictor
from models.objectives.latent import batch_standardised, place_standardised
from models.objectives.registry import build_objective
from models.objectives.vjepa import VJEPA
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig

GRID = Grid(4, 4, 4)


def make_objective(
    target_norm: Literal["token", "batch", "local"] = "batch",
    predict: Literal["tokens", "mean"] = "tokens",
    **model: object,
) -> VJEPA:
    torch.manual_seed(0)
    settings = ModelConfig(
        encoder="video_micro",
        image_size=32,
        patch_size=8,
        frames=4,
        **model,  # type: ignore[arg-type]
    )
    objective = ObjectiveConfig(name="vjepa", loss="l2", target_norm=target_norm, predict=predict)
    made = build_objective(
        "vjepa",
        model=dataclasses.asdict(settings) | {"mask_tokens": 1},
        objective=dataclasses.asdict(objective),
    )
    assert isinstance(made, VJEPA)
    return made


def make_batch(size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(size, GRID.tokens, generator=generator).argsort(1)
    clips = torch.randint(0, 256, (size, 3, 4, 32, 32), generator=generator, dtype=torch.uint8)
    return {"clips": clips, "context_ids_0": order[:, :20], "target_ids_0": order[:, 20:50]}


@pytest.mark.parametrize("local", [False, True])
def test_standardised_targets_follow_the_formula(local: bool) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(5, 7, 12)) * np.linspace(0.5, 3, 12) + rng.normal(size=(1, 7, 12))
    standardise = place_standardised if local else batch_standardised
    found = standardise(torch.from_numpy(tokens).float()).double().numpy()

    normed = tokens - tokens.mean(-1, keepdims=True)
    normed /= np.sqrt((normed**2).mean(-1, keepdims=True) + 1e-6)
    if local:
        for sample in normed:
            sample -= sample.sum(0) / 7
    expected = np.empty_like(tokens)
    for d in range(12):
        at_place = normed[:, :, d] - normed[:, :, d].mean(0)
        expected[:, :, d] = at_place / np.sqrt((at_place**2).mean() + 1e-4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_constant_targets_stay_finite_and_zero() -> None:
    tokens = torch.randn(1, 7, 12).expand(5, -1, -1)
    assert batch_standardised(tokens).abs().max() < 1e-3
    assert place_standardised(tokens).abs().max() < 1e-3


def test_what_all_tokens_of_a_sample_say_is_no_part_of_local_targets() -> None:
    """It is nearly all of targets that are only compared over the batch."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(8, count, 12, generator=generator) for count in (1, 16))
    share = [
        (found.mean(1).square().mean() / found.square().mean()).item()
        for found in (place_standardised(common + own / 4), batch_standardised(common + own / 4))
    ]
    assert share[0] < 1e-6
    assert share[1] > 0.8
    # And what a place says for itself is all that is left, at the scale of 1.
    assert place_standardised(common + own / 4).square().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("norm", ["batch", "local"])
def test_guessing_nothing_but_the_place_costs_one(norm: Literal["batch", "local"]) -> None:
    objective = make_objective(norm)
    with torch.no_grad():
        objective.predictor.proj.weight.zero_()
    batch = make_batch()
    batch["target_ids_0"] = torch.arange(GRID.tokens).expand(6, -1)  # all, so that none is missed
    assert objective(batch).loss.item() == pytest.approx(1.0, abs=0.02)


def test_default_targets_are_layer_normalised() -> None:
    settings = ModelConfig(encoder="video_micro", image_size=32, patch_size=8, frames=4)
    made = build_objective(
        "vjepa",
        model=dataclasses.asdict(settings),
        objective=dataclasses.asdict(ObjectiveConfig(name="vjepa")),
    )
    assert isinstance(made, VJEPA)
    _, targets_BND = made.encode_target(torch.randn(2, GRID.tokens, 192), None)
    assert targets_BND.mean(-1).abs().max() < 1e-5


@pytest.mark.parametrize("norm", ["batch", "local"])
def test_batches_whose_samples_lack_tokens_are_refused(norm: Literal["batch", "local"]) -> None:
    objective = make_objective(norm)
    kept = KeptTokens.of_mask(torch.tensor([[4, 4], [4, 4]]), torch.arange(16).expand(2, -1) > 3, 4)
    with pytest.raises(ValueError, match=f"target-norm {norm}"):
        objective.encode_target(torch.randn(2, GRID.tokens, 192), kept)


def mean_objective(norm: Literal["token", "batch"]) -> VJEPA:
    return make_objective(norm, predict="mean", predictor_input="mean")


@pytest.mark.parametrize("norm", ["token", "batch"])
def test_the_mean_of_hidden_tokens_is_what_is_predicted(norm: Literal["token", "batch"]) -> None:
    objective, batch = mean_objective(norm), make_batch()
    with torch.no_grad():
        objective.predictor.proj.weight.zero_()  # predicts zeros, the bias
    found = objective(batch).loss.item()

    clips = (batch["clips"].float() / 255 - objective.mean.view(3, 1, 1, 1)) / objective.std.view(
        3, 1, 1, 1
    )
    with torch.no_grad():
        tokens = objective.feature_encoder(clips).double().numpy()
    tokens -= tokens.mean(-1, keepdims=True)
    tokens /= np.sqrt((tokens**2).mean(-1, keepdims=True) + 1e-6)
    hidden = np.stack(
        [own[ids] for own, ids in zip(tokens, batch["target_ids_0"].numpy(), strict=True)]
    )
    means = hidden.mean(1)
    if norm == "batch":
        means -= means.mean(0)
        means /= np.sqrt((means**2).mean(0) + 1e-4)
    assert found == pytest.approx((means**2).mean(), rel=1e-4)


def test_a_predicted_mean_does_not_depend_on_the_order_of_hidden_tokens() -> None:
    batch = make_batch()
    turned = batch | {"target_ids_0": batch["target_ids_0"].flip(1)}
    others = batch | {"target_ids_0": batch["target_ids_0"].roll(1, 0)}
    losses = [mean_objective("batch")(part).loss.item() for part in (batch, turned, others)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] != pytest.approx(losses[2], abs=1e-4)  # the control: other tokens


def test_means_can_be_compared_where_samples_lack_tokens() -> None:
    kept = KeptTokens.of_mask(torch.tensor([[4, 4], [4, 4]]), torch.arange(16).expand(2, -1) > 3, 4)
    _, tokens_BND = mean_objective("batch").encode_target(torch.randn(2, GRID.tokens, 192), kept)
    assert tokens_BND.isfinite().all()


def test_local_targets_have_no_mean_to_predict() -> None:
    with pytest.raises(ValueError, match=r"--objective\.predict.*target-norm local"):
        ObjectiveConfig(name="vjepa", target_norm="local", predict="mean")


def make_predictor(*, pool_context: bool) -> Predictor:
    torch.manual_seed(0)
    predictor = Predictor(
        grid=GRID, encoder_width=24, width=24, depth=2, heads=2, pool_context=pool_context
    )
    with torch.no_grad():
        for parameter in predictor.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return predictor


@pytest.mark.parametrize("pool_context", [True, False])
def test_a_pooling_predictor_reads_nothing_but_the_mean(pool_context: bool) -> None:
    predictor = make_predictor(pool_context=pool_context)
    context_BKD, targets_B1T = torch.randn(2, 6, 24), torch.arange(40, 48).expand(2, 1, -1)
    other_BKD = context_BKD + torch.randn(2, 6, 24)
    other_BKD = other_BKD - other_BKD.mean(1, keepdim=True) + context_BKD.mean(1, keepdim=True)
    first = predictor(context_BKD, torch.arange(6).expand(2, -1), targets_B1T)
    second = predictor(other_BKD, torch.arange(10, 16).expand(2, -1), targets_B1T)
    assert torch.allclose(first, second, atol=1e-5) == pool_context
    assert not torch.allclose(first[0], first[1], atol=1e-3)  # it does read the mean


def test_fan_in_weights_have_their_deviation_in_encoder_and_predictor() -> None:
    objective = make_objective(init="fan_in", predictor_width=96)
    for part in (objective.encoder, objective.predictor):
        for name, module in part.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                expected = module.weight[0].numel() ** -0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05), name
    normal = make_objective(predictor_width=96)
    assert normal.encoder.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
