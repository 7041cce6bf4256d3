"""Counts of a step against closed forms that are written down here anew."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from helpers.pipelines.fake_training import change
from models.encoders.shape import find_preset
from pipelines.capacity import step_cost
from pipelines.capacity.step_cost import _KeptStorages, deepest, empty_objective
from pipelines.config.train import PretrainConfig
from pipelines.loading.masks.multiblock import mask_lengths
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import new_objective

BASE = RECIPES["cifar10_demo"][1]
count_step = functools.cache(step_cost.count_step)


def transformer_flops(tokens: int, width: int, depth: int) -> int:
    """2 FLOPs for each of the 12 D^2 weights of a block and token, and 4 N^2 D of attention."""
    return depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


def ijepa_flops(cfg: PretrainConfig) -> dict[str, int]:
    """Forward FLOPs of an image by network."""
    preset, model = find_preset(cfg.model.encoder), cfg.model
    context, target = mask_lengths(model.grid, cfg.mask)
    width, narrow, blocks = preset.width, preset.predictor_width, cfg.mask.num_targets
    embed = 2 * 3 * model.patch_size**2 * width
    predicted = blocks * transformer_flops(context + target, narrow, preset.predictor_depth)
    return {
        "target_encoder": model.grid.tokens * embed
        + transformer_flops(model.grid.tokens, width, preset.depth),
        "encoder": context * embed + transformer_flops(context, width, preset.depth),
        "predictor": 2 * width * narrow * (context + blocks * target) + predicted,
    }


@pytest.mark.parametrize(
    "cfg",
    [BASE, change(BASE, model={"encoder": "vit_s", "image_size": 96, "patch_size": 8})],
    ids=["cifar10_demo", "vit_s"],
)
def test_flops_are_those_of_the_formula(cfg: PretrainConfig) -> None:
    cost, expected = count_step(cfg), ijepa_flops(cfg)
    assert cost.parts == expected
    assert cost.forward_flops == sum(expected.values())
    # Backward, every weight meets the gradient of its output and of its input; attention makes
    # five products where it made two. The target encoder has no backward pass.
    trained = expected["encoder"] + expected["predictor"]
    assert 1.8 * trained < cost.backward_flops < 2.3 * trained


def test_the_paper_s_vit_h_14_costs_what_the_formula_says() -> None:
    cfg = RECIPES["ijepa_vith14_in1k"][1]
    one = count_step(cfg, depth=1)
    expected = ijepa_flops(cfg)
    preset = find_preset("vit_h")
    blocks = {
        "target_encoder": (256, preset.width, preset.depth),
        "encoder": (mask_lengths(cfg.model.grid, cfg.mask)[0], preset.width, preset.depth),
    }
    for name, (tokens, width, depth) in blocks.items():
        rest = transformer_flops(tokens, width, depth) - transformer_flops(tokens, width, 1)
        assert one.parts[name] + rest == expected[name]
    assert deepest(empty_objective(cfg)) == 32
    # 632 million weights, as the paper's table says of ViT-H, and a predictor 384 wide.
    whole = sum(p.numel() for p in empty_objective(cfg).encoder.parameters())
    assert 630e6 < whole < 634e6


def test_flops_of_a_clip_grow_with_its_frames() -> None:
    cfg = RECIPES["vjepa_movingmnist"][1]
    short = change(cfg, model={"frames": 4})
    ratio = count_step(cfg).parts["target_encoder"] / count_step(short).parts["target_encoder"]
    assert 2 < ratio < 2.2  # attention is quadratic


@pytest.mark.parametrize(
    "name", ["cifar10_demo", "lejepa_cifar10_demo", "mae_cifar10_demo", "vjepa_motion"]
)
def test_parameters_are_those_of_the_real_objective(name: str) -> None:
    cfg = RECIPES[name][1]
    cost, real = count_step(cfg), new_objective(cfg)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert cost.trained == trained
    assert cost.trained + cost.frozen == sum(p.numel() for p in real.parameters())


def test_checkpointing_keeps_less_and_computes_more() -> None:
    plain = count_step(BASE)
    again = count_step(change(BASE, model={"activation_checkpointing": True}))
    assert again.kept_bytes < 0.5 * plain.kept_bytes
    assert again.forward_flops == plain.forward_flops
    repeated = again.backward_flops - plain.backward_flops
    # Of the 12 D^2 weights of a block, the last layer's 4 D^2 need not be multiplied again.
    assert 0.6 < repeated / (plain.parts["encoder"] + plain.parts["predictor"]) < 0.7


def test_autocast_keeps_weights_once_whatever_the_batch() -> None:
    cost = count_step(change(BASE, run={"precision": "bf16"}))
    assert 0.9 < cost.cast_bytes / (2 * cost.matrices) <= 1.05
    assert count_step(BASE).cast_bytes == 0


def test_regions_and_whole_pictures_are_counted() -> None:
    cfg = change(BASE, model={"image_size": (48, 64), "fit": "whole"})
    assert count_step(cfg).flops > 0
    uncropped = change(BASE, data={"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)})
    left_out = change(uncropped, model={"exclude": ((0.0, 0.0, 1.0, 0.25),)})
    blocks = transformer_flops(12, 128, 4) + 12 * 2 * 3 * 64 * 128  # 12 of 16 patches
    assert count_step(left_out).parts["target_encoder"] == blocks


def test_regions_of_views_are_counted_as_if_they_were_there() -> None:
    cfg = RECIPES["lejepa_cifar10_demo"][1]
    left_out = change(cfg, model={"exclude": ((0.0, 0.0, 1.0, 0.25),)})
    assert count_step(left_out) == count_step(cfg)


def test_kept_storages_are_what_a_hand_count_says() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    kept = _KeptStorages(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        model(torch.randn(5, 16)).sum()
    # The first layer's input, and the rectified values, which the third layer shares.
    assert kept.bytes == 4 * (5 * 16 + 5 * 32)


def test_nothing_fake_is_left_behind() -> None:
    """Functions of `models` cache constants by device; a count once left fake ones there."""
    cfg = RECIPES["lejepa_cifar10_demo"][1]
    step_cost.count_step(cfg)
    loss = new_objective(cfg)(step_cost.make_batch(cfg, 4)).loss
    assert not isinstance(loss, FakeTensor)
    assert loss.item() > 0
