"""Loads a checkpoint's weights and configuration, and checks whether a run may resume from it.

`pipelines.runs.checkpoint_format` defines the files of a checkpoint, and
`pipelines.runs.checkpoint_list` finds the checkpoints of a run.
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
from models.shards import placed_like
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
    "encoder_of",
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
    """Whether changing the setting `key` would make `cfg` a different run (docs/checkpoints.md)."""
    free = {
        "anchor.checkpoint",
        "data.train",
        "data.mix",
        "data.test",
        "data.decode_in",
        "data.decode_threads",
    }
    free |= {"data.prefetch_batches", "data.published"}  # the manifest's hash says what is read
    section = key.partition(".")[0]
    if section == "run":
        return key in {"run.seed", "run.steps"} or (key == "run.accumulate" and cfg.compares_rows)
    return section != "watch" and key not in free


def check_resumable(
    saved: PretrainConfig, state: CheckpointState, cfg: PretrainConfig, manifest_hash: str
) -> None:
    """Refuses to resume a run under settings that would make it a different run.

    Workers, storage, precision, intervals and the location of the data may change. Settings that
    decide the order of samples, the shapes or the mathematics may not.

    Raises:
        CheckpointError: Such settings differ; the message names their flags.
    """
    before, after = (_settings(one) for one in (saved, cfg))
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


def _settings(cfg: PretrainConfig) -> dict[str, Any]:
    """Returns all settings by dotted name, with the fit of runs that do not name one."""
    return flatten(dataclasses.asdict(cfg)) | {"model.fit": cfg.model.chosen_fit}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def new_objective(cfg: PretrainConfig) -> Objective:
    """Builds the objective that a run's configuration describes, with fresh weights.

    Raises:
        ValueError: Settings contradict each other.
    """
    return build_objective(
        cfg.objective.name, model=cfg.model_settings, objective=cfg.objective_settings
    )


def load_objective(uri: str) -> tuple[Objective, PretrainConfig, dict[str, Any]]:
    """Rebuilds the objective of a checkpoint on the CPU.

    Args:
        uri: A checkpoint, or a run folder, which stands for its best checkpoint.

    Returns:
        The objective; the run's configuration; and the contents of state.json as a dict, plus
        `uri`, the checkpoint that was read.

    Raises:
        CheckpointError: There is no such checkpoint, or it does not load.
    """
    resolved = resolve_checkpoint(uri)
    with local_copy(resolved, "*.json", "model-*.safetensors") as folder:
        state, config = read_state(folder, resolved), read_config(folder, resolved)
        objective = new_objective(config)
        tensors = load_tensors(folder, "model", state.world_size, resolved)
        load_weights(objective, tensors, resolved)
    return objective, config, {**dataclasses.asdict(state), "uri": resolved}


def load_weights(objective: Objective, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Loads weights into an objective: all of them or, if any does not fit, none.

    Raises:
        CheckpointError: Names or shapes differ.
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
    weights = objective.state_dict()
    with torch.no_grad():
        objective.load_state_dict({n: placed_like(t, weights[n]) for n, t in tensors.items()})


def load_encoder(uri: str) -> tuple[VisionTransformer, PretrainConfig, dict[str, Any]]:
    """Loads the encoder to evaluate, export or serve.

    This is the target encoder of the objective; arguments, other results and errors are those of
    `load_objective`.
    """
    objective, config, info = load_objective(uri)
    return encoder_of(objective, config, info), config, info


def encoder_of(
    objective: Objective, config: PretrainConfig, info: Mapping[str, Any]
) -> VisionTransformer:
    """Returns the encoder of what `load_objective` has loaded.

    Raises:
        CheckpointError: It is no ViT.
    """
    encoder = objective.feature_encoder
    if not isinstance(encoder, VisionTransformer):
        raise CheckpointError(
            f"{info['uri']}: a world model with --objective.perception "
            f"{config.objective.perception} has no ViT.\nTrain one with --objective.perception vit,"
            " or use this one with pipelines.plan_episodes."
        )
    return encoder
