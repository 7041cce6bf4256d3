"""A checkpoint's weights and configuration back in memory, and whether a run may go on from it.

What a checkpoint folder holds is `pipelines.runs.checkpoint_format`; which of a run's checkpoints is meant,
`pipelines.runs.checkpoint_list`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.encoders.vit import VisionTransformer
from models.objectives.objective import Objective
from models.objectives.registry import build_objective
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_format import (
    FORMAT,
    GROUPS,
    CheckpointError,
    CheckpointState,
    load_share,
    load_tensors,
    read_config,
    read_state,
    save_checkpoint,
)
from pipelines.runs.checkpoint_list import committed_checkpoints, resolve_checkpoint
from pipelines.runtime.uris import local_copy

__all__ = [
    "FORMAT",
    "GROUPS",
    "CheckpointError",
    "CheckpointState",
    "check_resumable",
    "committed_checkpoints",
    "decides_the_run",
    "flatten",
    "load_encoder",
    "load_objective",
    "load_share",
    "load_tensors",
    "load_weights",
    "new_objective",
    "read_config",
    "read_state",
    "resolve_checkpoint",
    "save_checkpoint",
]


def decides_the_run(key: str, cfg: PretrainConfig) -> bool:
    """Whether changing this setting would make another run of `cfg` (facts: docs/checkpoints.md)."""
    free = {"data.train", "data.test", "data.decode_in", "data.decode_threads"}
    free |= {"data.prefetch_batches"}
    section = key.partition(".")[0]
    if section == "run":
        return key in {"run.seed", "run.steps"} or (key == "run.accumulate" and cfg.compares_rows)
    return section != "watch" and key not in free


def check_resumable(
    saved: PretrainConfig, state: CheckpointState, cfg: PretrainConfig, manifest_hash: str
) -> None:
    """Refuses to continue a run under settings that would make it a different run.

    Workers, storage, precision, intervals and places of the data may change; what decides the
    order of samples, the shapes or the mathematics may not.

    Raises:
        CheckpointError: naming every flag that differs.
    """
    before, after = flatten(dataclasses.asdict(saved)), flatten(dataclasses.asdict(cfg))
    differing = [
        f"--{key.replace('_', '-')} was {before[key]!r}, is now {after[key]!r}"
        for key in after
        if decides_the_run(key, cfg) and before[key] != after[key]
    ]
    if state.manifest_hash != manifest_hash:
        differing.append(
            f"--data.train was {saved.data.train} ({state.manifest_hash}), "
            f"is now {cfg.data.train} with other contents ({manifest_hash})"
        )
    if differing:
        raise CheckpointError(
            f"cannot resume run {cfg.run.name!r} at step {state.step}: {'; '.join(differing)}. "
            "Restore these settings, or start a new run with another --run.name (and "
            "--run.init-from to take over the weights)."
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def new_objective(cfg: PretrainConfig) -> Objective:
    """The objective that a run's configuration describes, with fresh weights.

    Raises:
        ValueError: settings that do not go together.
    """
    return build_objective(
        cfg.objective.name, model=cfg.model_settings, objective=cfg.objective_settings
    )


def load_objective(uri: str) -> tuple[Objective, PretrainConfig, dict[str, Any]]:
    """Rebuilds the objective of a checkpoint (or of a run folder's best), weights on the CPU.

    Returns:
        The objective, the run's configuration, and state.json as a dict plus `uri`, the checkpoint
        that was read.

    Raises:
        CheckpointError: no such checkpoint, or it does not load.
    """
    resolved = resolve_checkpoint(uri)
    with local_copy(resolved, "*.json") as folder:
        state, config = read_state(folder), read_config(folder)
    objective = new_objective(config)
    with local_copy(resolved, "model-*.safetensors") as folder:
        load_weights(objective, load_tensors(folder, "model", state.world_size), resolved)
    return objective, config, {**dataclasses.asdict(state), "uri": resolved}


def load_weights(objective: Objective, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Puts weights into an objective, every one or none.

    Raises:
        CheckpointError: names or shapes differ.
    """
    expected = {name: tuple(t.shape) for name, t in objective.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(n for n in expected | found if expected.get(n) != found.get(n))
    if wrong:
        shown = [f"{n}: {found.get(n)} instead of {expected.get(n)}" for n in wrong[:3]]
        raise CheckpointError(
            f"{origin}: {len(wrong)} weights do not fit the model of this configuration "
            f"({'; '.join(shown)})"
        )
    with torch.no_grad():
        objective.load_state_dict(dict(tensors))


def load_encoder(uri: str) -> tuple[VisionTransformer, PretrainConfig, dict[str, Any]]:
    """Returns the encoder to evaluate, export or serve: the target encoder of `load_objective`."""
    objective, config, info = load_objective(uri)
    encoder = objective.feature_encoder
    assert isinstance(encoder, VisionTransformer)
    return encoder, config, info
