"""The I-JEPA loss against a reference written here from the paper's equations.

Shape legend: B images, N patches, K context tokens, M blocks, T tokens of a block, D width.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.encoders.positions import sincos_2d
from models.objectives.ijepa import IJEPA
from models.objectives.latent import make_target, update_target
from models.objectives.registry import build_objective
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig


def make_objective(seed: int = 0, **objective: object) -> IJEPA:
    torch.manual_seed(seed)
    model = ModelConfig(encoder="vit_micro32", image_size=32, patch_size=4)
    made = build_objective(
        "ijepa",
        model=dataclasses.asdict(model),
        objective=dataclasses.asdict(ObjectiveConfig(**objective)),  # type: ignore[arg-type]
    )
    assert isinstance(made, IJEPA)
    return made


def make_batch(seed: int = 0, size: int = 4, keep: int = 16, block: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(size, 64, generator=generator).argsort(1)
    targets = torch.rand(size, 4, 64 - keep, generator=generator).argsort(2)[..., :block]
    rest = order[:, None, keep:].expand(-1, 4, -1)
    return {
        "images": torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "context_ids": order[:, :keep].sort(1).values,
        "target_ids": rest.gather(2, targets).sort(2).values,
    }


# --- reference: one image and one block at a time, from a state dict, without our modules ---------


def reference_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[name + ".weight"] + w[name + ".bias"]


def reference_linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def reference_blocks(x: Tensor, w: dict[str, Tensor], depth: int, heads: int) -> Tensor:
    for i in range(depth):
        y = reference_norm(x, w, f"blocks.{i}.norm1")
        q, k, v = reference_linear(y, w, f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        size = x.shape[-1] // heads
        out = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out.append(weights @ v[:, part])
        x = x + reference_linear(torch.cat(out, -1), w, f"blocks.{i}.attn.proj")
        y = reference_linear(reference_norm(x, w, f"blocks.{i}.norm2"), w, f"blocks.{i}.mlp.fc1")
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = x + reference_linear(y, w, f"blocks.{i}.mlp.fc2")
    return reference_norm(x, w, "norm")


def reference_positions(width: int, grid: int) -> Tensor:
    table = torch.zeros(grid * grid, width, dtype=torch.float64)
    quarter = width // 4
    for n in range(grid * grid):
        for half, place in enumerate((n % grid, n // grid)):  # column first, then row
            for i in range(quarter):
                angle = place / 10000 ** (i / quarter)
                table[n, half * 2 * quarter + i] = math.sin(angle)
                table[n, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table.float()


def reference_tokens(image: Tensor, w: dict[str, Tensor], patch: int) -> Tensor:
    convolved = F.conv2d(
        image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch
    )
    tokens = convolved[0].flatten(1).T
    return tokens + reference_positions(tokens.shape[1], image.shape[-1] // patch)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in module.state_dict().items()}


def reference_loss(objective: IJEPA, batch: dict[str, Tensor]) -> Tensor:
    enc, pred = weights_of(objective.encoder), weights_of(objective.predictor)
    assert objective.target_encoder is not None
    tgt = weights_of(objective.target_encoder)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    total, count = torch.zeros(()), 0
    for b in range(len(batch["images"])):
        image = (batch["images"][b] / 255 - mean[:, None, None]) / std[:, None, None]
        full = reference_blocks(reference_tokens(image, tgt, 4), tgt, depth=4, heads=3)
        full = (full - full.mean(-1, keepdim=True)) / (
            full.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()
        context_ids = batch["context_ids"][b]
        seen = reference_tokens(image, enc, 4)[context_ids]
        context = reference_blocks(seen, enc, depth=4, heads=3)
        table = reference_positions(48, 8)
        for target_ids in batch["target_ids"][b]:
            queries = pred["mask_token"][0, 0] + table[target_ids]
            known = reference_linear(context, pred, "embed") + table[context_ids]
            out = reference_blocks(torch.cat([known, queries]), pred, depth=2, heads=3)
            error = reference_linear(out[len(context_ids) :], pred, "proj") - full[target_ids]
            huber = torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5)
            total, count = total + huber.sum(), count + huber.numel()
    return total / count


@pytest.mark.parametrize("seed", range(4))  # by chance one batch hides an error by a factor of 100
def test_loss_equals_reference(seed: int) -> None:
    objective, batch = make_objective(seed), make_batch(seed)
    # The target differs from the encoder, and biases are not zero; otherwise half of the loss would
    # go untested.
    with torch.no_grad():
        for p in objective.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape))
        for p in objective.feature_encoder.parameters():
            p.add_(0.02 * torch.randn(p.shape))
        objective.feature_encoder.pos_embed.copy_(objective.encoder.pos_embed)
    ours = objective(batch).loss
    torch.testing.assert_close(ours, reference_loss(objective, batch), atol=1e-6, rtol=0)


def test_reference_notices_wrong_positions() -> None:
    objective, batch = make_objective(), make_batch()
    wrong = {**batch, "target_ids": batch["target_ids"].flip(0)}
    assert abs(objective(batch).loss - reference_loss(objective, wrong)) > 1e-5


@pytest.mark.parametrize(("name", "formula"), [("l2", torch.square), ("l1", torch.abs)])
def test_other_distances(name: str, formula: object) -> None:
    objective = make_objective(loss=name)
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(objective.distance(a, b), formula(a - b).mean())  # type: ignore[operator]


def test_no_gradient_reaches_the_target() -> None:
    objective = make_objective()
    objective(make_batch()).loss.backward()
    assert all(p.grad is None for p in objective.feature_encoder.parameters())
    trained = [p for p in objective.encoder.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    # Optimizers and DDP must not see the target either: DDP waits for gradients of all that is
    # trainable.
    assert not any(p.requires_grad for p in objective.feature_encoder.parameters())
    assert any(p.requires_grad for p in objective.encoder.parameters())


def test_gradients_flow_through_the_target_of_the_negative_control() -> None:
    objective = make_objective(target="self")
    assert objective.target_encoder is None
    assert objective.feature_encoder is objective.encoder
    ema = make_objective()
    for made in (objective, ema):
        made(make_batch()).loss.backward()
    ours = objective.encoder.blocks[0].mlp.fc1.weight.grad
    assert not torch.allclose(ours, ema.encoder.blocks[0].mlp.fc1.weight.grad)


def test_momentum_is_linear_and_applied_in_fp32() -> None:
    objective = make_objective(ema=(0.9, 1.0))
    assert objective.momentum(0, 10) == pytest.approx(0.9)
    assert objective.momentum(5, 10) == pytest.approx(0.95)
    target = make_target(objective.encoder)
    with torch.no_grad():
        for p in objective.encoder.parameters():
            p.add_(1.0)
    before = [p.clone() for p in target.parameters()]
    update_target(target, objective.encoder, 0.996)
    for old, new, online in zip(
        before, target.parameters(), objective.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.996 * old + 0.004 * online, atol=1e-7, rtol=1e-5)


def test_sincos_table_equals_loops_over_positions() -> None:
    torch.testing.assert_close(sincos_2d(24, 5, 5), reference_positions(24, 5))
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(30, 4, 4)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--model\.encoder.*vit_s"):
        build_objective(
            "ijepa",
            model=dataclasses.asdict(ModelConfig(encoder="vit_xxl")),
            objective=dataclasses.asdict(ObjectiveConfig()),
        )
    with pytest.raises(ValueError, match=r"--objective\.name"):
        build_objective("nope", model={}, objective={})
