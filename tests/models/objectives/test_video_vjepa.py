"""The V-JEPA loss against a reference written here from the paper's equations.

B clips, N tokens of a clip, K context tokens, T target tokens, D width, E dimensions of a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.encoders.positions import POSITIONS
from models.objectives.ijepa import IJEPA
from models.objectives.registry import build_objective
from models.objectives.vjepa import VJEPA
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig

FRAMES, SIDE, TUBES = 4, 4, 2  # 4 frames of 32 pixels in tubelets of 2 x 8 x 8: 32 tokens
LENGTHS = ((12, 16), (6, 24))  # context and target tokens of each mask generator
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_objective(seed: int = 0, positions: str = "sincos", **objective: object) -> VJEPA:
    torch.manual_seed(seed)
    model = dataclasses.asdict(
        ModelConfig(encoder="video_micro", image_size=32, patch_size=8, mean=MEAN, std=STD)
    )
    clip = {"frames": FRAMES, "tubelet": 2, "positions": positions}
    settings = {"loss": "l1", "ema": (0.998, 1.0), **objective}
    made = build_objective(
        "vjepa",
        model=model | clip,
        objective=dataclasses.asdict(ObjectiveConfig(**settings)),  # type: ignore[arg-type]
    )
    assert isinstance(made, VJEPA)
    return made


def make_batch(seed: int = 0, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 3, FRAMES, 32, 32)
    batch = {"clips": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)}
    for g, (keep, hide) in enumerate(LENGTHS):
        order = torch.rand(size, TUBES * SIDE**2, generator=generator).argsort(1)
        batch[f"context_ids_{g}"] = order[:, :keep].sort(1).values
        batch[f"target_ids_{g}"] = order[:, keep : keep + hide].sort(1).values
    return batch


def disturb(objective: VJEPA) -> None:
    """A target that differs from the encoder, and no weights of 0 or 1 that would hide a fault."""
    with torch.no_grad():
        for p in objective.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape))
        for name, p in objective.feature_encoder.named_parameters():
            if name != "pos_embed":
                p.add_(0.02 * torch.randn(p.shape))


# --- reference: one clip and one mask at a time, from a state dict, without our modules -----------

Turn = Callable[[Tensor, Tensor], Tensor]
"""Rotates the vectors [K, E] of one head by their positions [K, 3]."""


def place(ids: Tensor) -> Tensor:
    return torch.stack([ids // SIDE**2, ids // SIDE % SIDE, ids % SIDE], dim=1).double()


def sincos(ids: Tensor, width: int) -> Tensor:
    half = math.ceil(width / 6)
    parts = []
    for axis in range(3):
        angles = place(ids)[:, axis, None] / 10000 ** (torch.arange(half).double() / half)
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1)[:, :width].float()


def no_turn(x: Tensor, ids: Tensor) -> Tensor:
    return x


def turn(released: bool) -> Turn:
    """Rotates by one matrix per token, which has 2 x 2 blocks on its diagonal."""

    def apply(x: Tensor, ids: Tensor) -> Tensor:
        share = 2 * (x.shape[1] // 3 // 2)
        matrices = torch.eye(x.shape[1], dtype=torch.float64).repeat(len(ids), 1, 1)
        for axis in range(3):
            for i in range(share):
                power = i % (share // 2) if released else i // 2
                angle = place(ids)[:, axis] / 10000 ** (power / (share // 2))
                at, other = axis * share + i, axis * share + (i ^ 1)
                matrices[:, at, at] = angle.cos()
                matrices[:, at, other] = angle.sin() * (1 if i % 2 else -1)
        return (matrices.float() @ x[:, :, None])[:, :, 0]

    return apply


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[name + ".weight"] + w[name + ".bias"] if name else scaled


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def blocks(x: Tensor, w: dict[str, Tensor], heads: int, ids: Tensor, turned: Turn) -> Tensor:
    for i in range(len({k.split(".")[1] for k in w if k.startswith("blocks.")})):
        y = norm(x, w, f"blocks.{i}.norm1")
        q, k, v = linear(y, w, f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        size, out = x.shape[-1] // heads, []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = turned(q[:, part], ids) @ turned(k[:, part], ids).T / math.sqrt(size)
            out.append(weights.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(out, -1), w, f"blocks.{i}.attn.proj")
        y = linear(norm(x, w, f"blocks.{i}.norm2"), w, f"blocks.{i}.mlp.fc1")
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear(y, w, f"blocks.{i}.mlp.fc2")
    return norm(x, w, "norm")


def encode(clip: Tensor, w: dict[str, Tensor], ids: Tensor, added: bool, turned: Turn) -> Tensor:
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    convolved = functional.conv3d(clip[None], kernel, bias, stride=(2, 8, 8))
    tokens = convolved[0].flatten(1).T[ids]
    if added:
        tokens = tokens + sincos(ids, tokens.shape[1])
    return blocks(tokens, w, 3, ids, turned)


def reference_loss(objective: VJEPA, batch: dict[str, Tensor], positions: str) -> Tensor:
    assert objective.target_encoder is not None
    networks = (objective.encoder, objective.predictor, objective.target_encoder)
    enc, pred, tgt = ({k: v.detach() for k, v in m.state_dict().items()} for m in networks)
    added = positions == "sincos"
    turned = no_turn if added else turn(positions == "rope_released")
    losses = []
    for g in range(len(LENGTHS)):
        errors = []
        for b in range(len(batch["clips"])):
            mean, std = (torch.tensor(v)[:, None, None, None] for v in (MEAN, STD))
            clip = (batch["clips"][b] / 255 - mean) / std
            seen, hidden = batch[f"context_ids_{g}"][b], batch[f"target_ids_{g}"][b]
            everything = torch.arange(TUBES * SIDE**2)
            target = norm(encode(clip, tgt, everything, added, turned), {}, "")[hidden]
            known = linear(encode(clip, enc, seen, added, turned), pred, "embed")
            asked = pred["mask_token"][g].expand(len(hidden), -1)
            ids = torch.cat([seen, hidden])
            tokens = torch.cat([known, asked])
            if added:
                tokens = tokens + sincos(ids, tokens.shape[1])
            out = blocks(tokens, pred, 2, ids, turned)[len(seen) :]
            errors.append((linear(out, pred, "proj") - target).abs().mean())
        losses.append(torch.stack(errors).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("positions", POSITIONS)
def test_loss_equals_reference(positions: str) -> None:
    objective, batch = make_objective(positions=positions), make_batch()
    disturb(objective)
    output = objective(batch)
    expected = reference_loss(objective, batch, positions)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    each = torch.stack([output.metrics["loss_0"], output.metrics["loss_1"]])
    torch.testing.assert_close(each.mean(), output.loss.detach())


@pytest.mark.parametrize("other", POSITIONS[1:])
def test_reference_notices_faults(other: str) -> None:
    objective, batch = make_objective(positions=other), make_batch()
    disturb(objective)
    loss = objective(batch).loss
    moved = batch | {"target_ids_1": batch["target_ids_1"].flip(0)}
    wrong_layout = next(p for p in POSITIONS[1:] if p != other)
    for expected in (
        reference_loss(objective, moved, other),
        reference_loss(objective, batch, wrong_layout),
    ):
        assert abs(loss - expected) > 3e-5


# --- number of passes, mask tokens and inputs -----------------------------------------------------


def test_the_target_runs_once_and_the_context_once_per_generator() -> None:
    objective, calls = make_objective(), {"target": [], "context": []}
    assert objective.target_encoder is not None
    for name, encoder in (("target", objective.target_encoder), ("context", objective.encoder)):
        encoder.norm.register_forward_hook(
            lambda _m, _i, out, name=name: calls[name].append(out.shape[1])
        )
    objective(make_batch())
    assert calls == {"target": [32], "context": [12, 6]}


def test_every_generator_has_a_mask_token_that_starts_at_zero() -> None:
    objective = make_objective()
    tokens = objective.predictor.mask_token
    assert tokens.shape == (2, 1, 48)
    assert not tokens.any()
    objective(make_batch()).loss.backward()
    assert all(t.abs().sum() > 0 for t in tokens.grad)
    assert not torch.allclose(tokens.grad[0], tokens.grad[1])


def test_number_of_generators_is_a_setting() -> None:
    model = dataclasses.asdict(ModelConfig(encoder="video_micro", image_size=32, patch_size=8))
    clip = {"frames": FRAMES, "tubelet": 2, "mask_tokens": 3}
    made = build_objective(
        "vjepa", model=model | clip, objective=dataclasses.asdict(ObjectiveConfig())
    )
    ids = [f"{part}_ids_{g}" for g in range(3) for part in ("context", "target")]
    assert made.inputs == ("clips", *ids)


def test_objectives_name_the_inputs_they_read() -> None:
    """Every batch entry that an objective names is needed, and no other is."""
    objective, batch = make_objective(), make_batch()
    assert set(objective.inputs) == batch.keys()
    loss = objective(batch).loss
    for name in objective.inputs:
        with pytest.raises(KeyError, match=name):
            objective({k: v for k, v in batch.items() if k != name})
    assert torch.equal(objective(batch | {"label": torch.zeros(3)}).loss, loss)
    assert IJEPA.inputs == ("images", "context_ids", "target_ids")


def test_no_gradient_reaches_the_target_and_it_follows() -> None:
    objective = make_objective(ema=(0.9, 1.0))
    objective(make_batch()).loss.backward()
    target = objective.target_encoder
    assert target is not None
    assert all(p.grad is None for p in target.parameters())
    trained = [p for p in objective.encoder.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    disturb(objective)
    old = target.blocks[0].mlp.fc1.weight.clone()
    objective.after_step(5, 10)
    new = objective.encoder.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(
        target.blocks[0].mlp.fc1.weight, 0.95 * old + 0.05 * new, atol=1e-7, rtol=1e-5
    )


def test_monitored_features_are_the_targets() -> None:
    objective, batch = make_objective(), make_batch()
    disturb(objective)
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (MEAN, STD))
    tokens = objective.feature_encoder((batch["clips"] / 255 - mean) / std)
    pooled = objective(batch).monitored["target_pooled"]
    assert not pooled.requires_grad
    torch.testing.assert_close(pooled, tokens.mean(1).detach(), atol=1e-5, rtol=1e-4)


# --- learning --------------------------------------------------------------------------------


def moving_squares(size: int, generator: torch.Generator) -> Tensor:
    """Clips, uint8, of bright squares on dark noise; position, colour and direction are random."""
    clips = torch.randint(0, 40, (size, 3, FRAMES, 32, 32), generator=generator, dtype=torch.uint8)
    start = torch.randint(8, 16, (size, 2), generator=generator)
    speed = torch.randint(-2, 3, (size, 2), generator=generator)
    colour = torch.randint(100, 256, (size, 3, 1, 1), generator=generator, dtype=torch.uint8)
    for b in range(size):
        for t in range(FRAMES):
            y, x = (start[b] + t * speed[b]).tolist()
            clips[b, :, t, y : y + 8, x : x + 8] = colour[b]
    return clips


def train(target: str, steps: int = 40) -> tuple[float, float]:
    """Trains and returns the spread of pooled target features at the first and the last step."""
    objective = make_objective(target=target, ema=(0.99, 1.0))
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    spread = []
    for step in range(steps):
        batch = make_batch(seed=step, size=16) | {"clips": moving_squares(16, generator)}
        output = objective(batch)
        spread.append(float(output.monitored["target_pooled"].std(0).mean()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.after_step(step, steps)
    return spread[0], spread[-1]


def test_features_collapse_without_an_ema_target_and_not_with_one() -> None:
    start, collapsed = train("self")
    same_start, kept = train("ema")
    assert start == same_start
    assert kept > 0.7 * start  # 0.032 of 0.037
    assert collapsed < 0.2 * start  # 0.002
