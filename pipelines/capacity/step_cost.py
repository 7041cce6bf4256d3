"""Counts what one training step needs, without computing it: FLOPs, parameters, kept activations.

The real objective runs on fake tensors, which have shapes but no memory, under torch's counter of
FLOPs. Token counts are those of the run's own masks. What torch's counter counts is matrix products
and attention; everything else is below a few percent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.objectives.objective import Objective
from pipelines.config.train import PretrainConfig
from pipelines.loading.masks.layouts import CALIBRATION_SIZES, draw_crops
from pipelines.loading.masks.maskers import make_masker
from pipelines.runs.checkpoints import new_objective

COUNTED = (2, 4)
"""Samples of the two steps that are counted: what grows with them belongs to a sample."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step needs; all of it grows with the samples but for the parts that say otherwise."""

    trained: int
    """Parameters with a gradient."""
    frozen: int
    """Parameters without one: the target encoder."""
    matrices: int
    """Of `trained`, those in matrices (or tensors of more axes)."""
    forward_flops: float
    """FLOPs of the forward pass, a sample; 2 for a multiplication and an addition."""
    backward_flops: float
    parts: dict[str, float]
    """Forward FLOPs a sample by network: `encoder` (of the context or the views),
    `target_encoder`, `predictor` and so on."""
    kept_bytes: float
    """Bytes that the forward pass keeps for the backward pass, a sample."""
    cast_bytes: float
    """Bytes that it keeps whatever the batch: weights in the type of autocast."""
    block_bytes: float
    """Parameters of the largest block, which a sharded run gathers whole."""

    @property
    def flops(self) -> float:
        """FLOPs a sample, forward and backward."""
        return self.forward_flops + self.backward_flops


def count_step(cfg: PretrainConfig, depth: int | None = None) -> StepCost:
    """Counts a step of a run.

    Args:
        cfg: the run.
        depth: only the first so many blocks of every network, as `measure` runs them.

    Raises:
        ValueError: there is no such preset or objective, or no mask can be drawn.
    """
    cfg = countable(cfg)
    objective = empty_objective(cfg, depth)
    parameters = list(objective.parameters())
    trained = [p for p in parameters if p.requires_grad]
    few, many = _run_fake(cfg, objective)
    samples = COUNTED[1]
    per_sample = (many.kept_bytes - few.kept_bytes) / (COUNTED[1] - COUNTED[0])
    return StepCost(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in parameters) - sum(p.numel() for p in trained),
        matrices=sum(p.numel() for p in trained if p.ndim > 1),
        forward_flops=many.forward_flops / samples,
        backward_flops=(many.flops - many.forward_flops) / samples,
        parts={name: flops / samples for name, flops in many.parts.items()},
        kept_bytes=per_sample,
        cast_bytes=max(0.0, many.kept_bytes - per_sample * samples),
        block_bytes=_largest_block(objective),
    )


def countable(cfg: PretrainConfig) -> PretrainConfig:
    """Returns a run that can be counted: views leave regions out by where they lie in each picture,
    which fake tensors do not know, so their tokens are counted as if nothing were left out."""
    if cfg.masks != "none" or not cfg.model.exclude:
        return cfg
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, exclude=()))


def empty_objective(cfg: PretrainConfig, depth: int | None = None) -> Objective:
    """Builds the objective of a run without memory for its weights (on the device `meta`)."""
    with torch.device("meta"):
        objective = new_objective(cfg)
    if depth is not None:
        for module in objective.modules():
            blocks = getattr(module, "blocks", None)
            if isinstance(blocks, nn.ModuleList):
                module.blocks = blocks[:depth]
    return objective


def deepest(objective: Objective) -> int:
    """Number of blocks of its deepest network."""
    lists = (getattr(module, "blocks", None) for module in objective.modules())
    return max((len(blocks) for blocks in lists if isinstance(blocks, nn.ModuleList)), default=0)


def make_batch(cfg: PretrainConfig, samples: int) -> dict[str, Tensor]:
    """Returns a batch as the loader makes them, with pixels of noise and the run's own masks."""
    keys_B = np.arange(samples, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sizes_B2 = np.resize(np.array(CALIBRATION_SIZES, np.int32), (samples, 2))
    _, layout = draw_crops(keys_B, sizes_B2, np.zeros(samples, np.bool_), cfg.model, cfg.data)
    masker = make_masker(cfg)
    masker.check()
    masks = masker.for_batch(np.uint64(1), samples) if masker.legacy else masker.for_samples(
        keys_B, layout
    )  # fmt: skip
    height, width = cfg.model.height_width
    if cfg.model.chosen_fit == "whole":
        patch = cfg.model.patch_size
        height, width = patch, patch * cfg.model.grid.per_step
    time = () if cfg.modality == "image" else (cfg.clip_frames,)
    pixels = torch.randint(0, 256, (samples, 3, *time, height, width), dtype=torch.uint8)
    batch = {name: torch.from_numpy(ids.astype(np.int64)) for name, ids in masks.items()}
    batch["images" if cfg.modality == "image" else "clips"] = pixels
    batch["sample_keys"] = torch.from_numpy(keys_B.view(np.int64))
    if cfg.objective.registered.actions:
        batch["actions"] = torch.zeros(samples, cfg.clip_frames - 1, cfg.objective.action_width)
    batch["sets"] = torch.zeros(samples, dtype=torch.int64)
    if layout is not None:
        ids = [torch.from_numpy(kept) for kept in layout.kept_ids(cfg.model.grid.tubes)]
        kept = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1).long()
        batch["grids"] = torch.from_numpy(layout.grids_B2.astype(np.int64))
        batch["kept_ids"], batch["kept_valid"] = kept.clamp(min=0), kept >= 0
        regions = torch.tensor(cfg.model.exclude, dtype=torch.float32).reshape(1, -1, 4)
        batch["regions"] = regions.expand(samples, -1, -1).clone()
    return batch


@dataclass
class _Counted:
    forward_flops: float
    flops: float
    """Of the backward pass too, if there was one."""
    parts: dict[str, float]
    kept_bytes: float


def _run_fake(cfg: PretrainConfig, objective: Objective) -> list[_Counted]:
    """Runs steps of `COUNTED` samples on fake tensors, the last one backward too."""
    batches = [make_batch(cfg, samples) for samples in COUNTED]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = objective.to_empty(device="cpu")
        found = []
        for batch in batches:
            values: dict[str, Tensor] = {n: mode.from_tensor(v) for n, v in batch.items()}
            found.append(_count(cfg, fake, values, backward=batch is batches[-1]))
        return found


def _count(
    cfg: PretrainConfig, objective: Objective, batch: dict[str, Tensor], *, backward: bool
) -> _Counted:
    kept = _KeptStorages(objective)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=cfg.run.precision == "bf16")
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, _same), bf16:
            loss = objective(batch).loss
        forward, parts = counter.get_total_flops(), _by_network(counter.flop_counts)
        if backward:
            loss.backward()
    return _Counted(forward, counter.get_total_flops(), parts, kept.bytes)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _KeptStorages:
    """Adds up the storages that are kept for the backward pass, each once, without the weights."""

    def __init__(self, objective: nn.Module) -> None:
        tensors = [*objective.parameters(), *objective.buffers()]
        self._seen = {t.untyped_storage()._cdata: t for t in tensors}
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # held, so that no other one gets its number
            self.bytes += storage.nbytes()
        return tensor


def _by_network(counts: dict[str, dict[Any, int]]) -> dict[str, float]:
    """Adds up FLOPs by the networks of the objective, from counts by module.

    A module that was called as such has its FLOPs under its own name; of a network of which only
    parts were called, these are added up.
    """
    found: dict[str, float] = {}
    names = [name for name in counts if "." in name]
    for name in names:
        inner = name.split(".")[1:]
        inner = inner[1:] if inner[0] == "objective" else inner
        above = name.rpartition(".")[0]
        covered = any(above == other or above.startswith(f"{other}.") for other in names
                      if other.count(".") >= name.count(".") - len(inner) + 1)  # fmt: skip
        if inner and not covered:
            found[inner[0]] = found.get(inner[0], 0.0) + sum(counts[name].values())
    return found


def _largest_block(objective: nn.Module) -> float:
    """Bytes of the parameters of the largest transformer block, fp32."""
    blocks = [
        block
        for module in objective.modules()
        if isinstance(getattr(module, "blocks", None), nn.ModuleList)
        for block in module.blocks  # type: ignore[union-attr]
    ]
    return 4.0 * max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
