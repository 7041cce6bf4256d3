"""The training step on a GPU that is not there: every tensor on it, and no wait for it.

The loop is the trainer's own, with the backward pass replaced by gradients of noise, because
autograd does not run on fake tensors of a GPU. Networks have two blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from helpers.fake_device import GPU, WAITS, Watch, WrongDevice, fake, fake_gpu, put
from helpers.pipelines.fake_training import change
from pipelines.capacity.step_cost import empty_objective, make_batch
from pipelines.config.train import PretrainConfig
from pipelines.recipes.registry import RECIPES
from pipelines.runs.anchor import Anchored
from pipelines.training import trainer
from pipelines.training.contract import DataSource, Worker
from pipelines.training.state import TrainState, state_of

ROWS, STEPS = 4, 2
Spoil = Callable[[TrainState], None]


def of(name: str, **sections: Any) -> PretrainConfig:
    """A recipe with a batch of `ROWS` for one worker, which stops after `STEPS`."""
    cfg = change(RECIPES[name][1], **sections)
    accumulate = cfg.run.accumulate
    return change(
        cfg,
        data={"batch_size": ROWS * accumulate, "lanes": 1},
        run={"gpu": True, "workers": 1, "stop_after": STEPS, "log_every": 2},
    )


def take_steps(cfg: PretrainConfig, spoil: Spoil = lambda state: None) -> TrainState:
    """Takes `STEPS` steps of the trainer's loop on the fake GPU."""
    batch = make_batch(cfg, cfg.data.batch_size)
    meta = empty_objective(cfg, depth=2)
    recorder = SimpleNamespace(
        timer=mock.Mock(), reads_at=lambda step: True, after_step=lambda *_: None,
        taken_over=None, stopped=None,
    )  # fmt: skip
    with fake_gpu():
        state = state_of(put(meta), cfg, GPU)
        host = {name: fake(values) for name, values in batch.items()}

        def backward(loss: Tensor) -> None:
            assert (loss.device, loss.dtype) == (GPU, torch.float32)
            for parameter in state.objective.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)

        spoil(state)
        data = DataSource(lambda *_, **__: [host] * STEPS, 1, "none")
        with Watch(), mock.patch.object(Tensor, "backward", backward):
            trainer._steps(cfg, Worker(device=GPU), data, state, state.objective, recorder)
    return state


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_every_recipe_stays_on_the_device(name: str) -> None:
    state = take_steps(of(name))
    assert state.step == STEPS
    places = {t.device for group in state.optimizer.state.values() for t in group.values()}
    assert places == {GPU}
    assert {t.device for t in state.meter._sums.values()} == {GPU}


VARIANTS = {
    "fp32": of("ijepa_vits16", run={"precision": "fp32"}),
    "bf16": of("lejepa_cifar10_demo", run={"precision": "bf16"}),
    "accumulate": of("cifar10_demo", run={"accumulate": 2}),
    "clipped": of("cifar10_demo", optim={"clip_norm": 1.0}),
    "checkpointing": of("cifar10_demo", model={"activation_checkpointing": True}),
    "regularized": of("cifar10_demo", objective={"regularize": "context_pooled"}),
    "self": of("cifar10_demo", objective={"target": "self"}),
    "batch-norm": of("cifar10_demo", objective={"target_norm": "batch"}),
    "predicted-mean": of("cifar10_demo", objective={"target_norm": "batch", "predict": "mean"}),
    "whole": of("cifar10_demo", model={"image_size": (48, 64), "fit": "whole"}),
    "excluded": of("cifar10_demo", model={"exclude": ((0.0, 0.0, 1.0, 0.25),)}),
    "excluded-clips": of("vjepa_movingmnist", model={"exclude": ((0.0, 0.0, 1.0, 0.25),)}),
    "mean": of("mae_cifar10_demo", model={"predictor_input": "mean"}),
    "rope": of("cifar10_demo", model={"positions": "rope"}),
}  # fmt: skip


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_so_does_one_with_other_settings(cfg: PretrainConfig) -> None:
    assert take_steps(cfg).step == STEPS


@pytest.mark.parametrize(
    "optim",
    [
        {"name": "adamw"},
        {"name": "muon"},
        {"name": "schedulefree"},
        {"name": "hyper-adamw"},
        {"name": "hyper-adamw", "tune": ("lr", "beta1", "beta2", "eps", "weight_decay")},
    ],
)
def test_so_does_one_with_every_optimizer(optim: dict[str, Any]) -> None:
    assert take_steps(of("cifar10_demo", optim=optim)).step == STEPS


REGION = ((0.0, 0.0, 1.0, 0.25),)
WAITING = {
    # The number of tokens depends on the crops, so it is read (models/objectives/view_regions.py).
    "views that leave regions out": of("vicreg_cifar10_demo", model={"exclude": REGION}),
    # The package reads its estimate of the distance in every step.
    "prodigy": of("cifar10_demo", optim={"name": "prodigy"}),
}


@pytest.mark.parametrize("cfg", WAITING.values(), ids=WAITING)
def test_settings_that_are_known_to_wait_do_so(cfg: PretrainConfig) -> None:
    with pytest.raises(WAITS):
        take_steps(cfg)


def test_the_anchor_is_known_to_wait() -> None:
    """How many rows are of old footage is read from the batch (pipelines/runs/anchor.py)."""
    cfg = of("cifar10_demo")
    objective, frozen = empty_objective(cfg, depth=2), empty_objective(cfg, depth=2).encoder
    anchored, batch = Anchored(objective, frozen, 1.0), make_batch(cfg, ROWS)
    with fake_gpu():
        put(anchored)
        put(frozen)
        there = {name: fake(values, GPU) for name, values in batch.items()}
        assert objective(there).loss.device == GPU
        with Watch(), pytest.raises(WAITS):
            anchored(there)


# --- controls: what each of these leaves in the wrong place, or waits for, is found


def _parameter(state: TrainState) -> None:
    layer = state.objective.encoder.blocks[1].mlp.fc1
    layer.weight = nn.Parameter(fake(layer.weight))


def _constant(state: TrainState) -> None:
    state.objective.std = fake(state.objective.std)


def _target(state: TrainState) -> None:
    norm = state.objective.target_encoder.norm
    norm.weight = nn.Parameter(fake(norm.weight))


def _moment(state: TrainState) -> None:
    for parameter in state.optimizer.param_groups[0]["params"]:
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state.optimizer.state[parameter] = {"step": torch.zeros((), device=GPU), **zeros}
    state.optimizer.state[parameter]["exp_avg"] = torch.zeros(parameter.shape)


def _watched(state: TrainState) -> None:
    moments = state.watches["target_pooled"]._moments
    moments["gram"] = fake(moments["gram"])


def _metered(state: TrainState) -> None:
    state.meter._sums["loss"] = torch.zeros(2, dtype=torch.float64)


def _after(state: TrainState, does: Callable[[Tensor], object]) -> None:
    norm = state.objective.encoder.norm
    norm.register_forward_hook(lambda module, args, output: does(output) and None)


@pytest.mark.parametrize("spoil", [_parameter, _constant, _target, _moment, _watched, _metered])
def test_a_tensor_in_the_wrong_place_is_found(spoil: Spoil) -> None:
    with pytest.raises((RuntimeError, WrongDevice), match=r"device|is on cpu"):
        take_steps(of("cifar10_demo"), spoil)


@pytest.mark.parametrize(
    "does",
    [
        lambda tokens: tokens.sum().item(),
        lambda tokens: tokens[0, 0, 0] > 0 and 1,
        lambda tokens: tokens.cpu(),
        lambda tokens: tokens.max().to("cpu"),
        lambda tokens: tokens[tokens > 0],
        lambda tokens: tokens[torch.tensor([0])],
        lambda tokens: tokens + torch.tensor([1.0], device=GPU),
        lambda tokens: torch._foreach_add([tokens], tokens.detach().sum()),
    ],
    ids=["item", "if", "cpu", "to", "mask", "index", "literal", "foreach"],
)
def test_a_wait_is_found(does: Callable[[Tensor], object]) -> None:
    with pytest.raises(WAITS):
        take_steps(of("cifar10_demo"), lambda state: _after(state, does))
