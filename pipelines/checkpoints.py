"""What a checkpoint folder holds, how it is written by many processes and read by one.

    config.json                              the run's configuration
    state.json                               step, position in the data, metrics so far, manifest hash
    model-00000-of-00002.safetensors         objective's weights, target encoder included
    optimizer-00000-of-00002.safetensors     optimizer state by parameter name
    loop-00000-of-00002.safetensors          random number generators, meters

Each of W processes writes its share of the tensors to files of its own, without talking to the
others; Ray Train merges the folders. No pickle: reading a stranger's checkpoint runs no code.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.objectives import Objective, build_objective
from models.tensor_files import save_tensors
from models.vit import VisionTransformer
from pipelines.config import PretrainConfig, from_json, to_json
from pipelines.storage import join_uri, local_copy, open_uri, ray_storage

FORMAT = 2
GROUPS = ("model", "optimizer", "loop")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the run stops rather than start over silently."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """state.json: where a run stood."""

    step: int
    """Optimizer steps taken."""
    position: int
    """Samples consumed: step x batch size, the run's whole position in the data."""
    epoch: float
    """Position in epochs."""
    manifest_hash: str
    """Identity of the training shards."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """The newest reading of every metric."""
    strikes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Suspicious readings in a row, of each feature that the collapse watch looks at."""
    world_size: int = 1
    """Processes that wrote it."""
    format: int = FORMAT
    """Version of this layout."""


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: CheckpointState,
    config: PretrainConfig,
    *,
    rank: int = 0,
) -> None:
    """Writes one process's share of a checkpoint into `folder`.

    Args:
        folder: Existing folder; the processes' folders are merged afterwards.
        tensors: Per group of `GROUPS`, named tensors. `model` and `optimizer` are the same on every
            process and are divided among them; `loop` is this process's own.
        state: Goes to state.json (rank 0 writes it).
        config: Goes to config.json (rank 0 writes it).
        rank: This process, of `state.world_size`.
    """
    for group in GROUPS:
        share = dict(tensors[group])
        if group != "loop":
            share = {name: share[name] for name in _shares(share, state.world_size)[rank]}
        path = folder / _file_name(group, rank, state.world_size)
        save_tensors(share, path)
    if rank == 0:
        (folder / "config.json").write_text(to_json(config))
        (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=2))


def _shares(tensors: Mapping[str, Tensor], parts: int) -> list[list[str]]:
    """Divides tensors into `parts` of about equal bytes, the same way on every process."""
    names: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        lightest = loads.index(min(loads))
        names[lightest].append(name)
        loads[lightest] += tensors[name].nbytes
    return names


def _file_name(group: str, rank: int, world_size: int) -> str:
    return f"{group}-{rank:05d}-of-{world_size:05d}.safetensors"


def read_state(folder: Path) -> CheckpointState:
    """Reads state.json of a checkpoint folder.

    Raises:
        CheckpointError: absent, unreadable, or of another format.
    """
    try:
        values = json.loads((folder / "state.json").read_text())
        state = CheckpointState(**values)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot read state.json: {error}") from error
    if state.format != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {state.format}, expected {FORMAT}")
    return state


def read_config(folder: Path) -> PretrainConfig:
    """Reads config.json of a checkpoint folder.

    Raises:
        CheckpointError: absent, unreadable, or with keys this version does not know.
    """
    try:
        return from_json(PretrainConfig, (folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot read config.json: {error}") from error


def load_tensors(folder: Path, group: str, world_size: int) -> dict[str, Tensor]:
    """Reads one group's tensors, all shares put together, onto the CPU.

    Raises:
        CheckpointError: a share is missing, cut short or not a safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for rank in range(world_size):
        tensors |= load_share(folder, group, rank, world_size)
    return tensors


def load_share(folder: Path, group: str, rank: int, world_size: int) -> dict[str, Tensor]:
    """Reads the share of one group that process `rank` of `world_size` wrote; raises as above."""
    path = folder / _file_name(group, rank, world_size)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: checkpoint does not load: {error}") from error


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


def resolve_checkpoint(uri: str) -> str:
    """Returns the checkpoint a URI means: itself, or a run folder's best by online kNN.

    A run without kNN scores means its newest checkpoint. Half-uploaded ones do not count: Ray
    Train's own list of a run's committed checkpoints decides.

    Raises:
        CheckpointError: neither a checkpoint nor a run with one.
    """
    fs, path = open_uri(uri)
    if fs.exists(f"{path}/state.json"):
        return uri
    checkpoints = committed_checkpoints(uri)
    if not checkpoints:
        raise CheckpointError(f"{uri}: neither a checkpoint nor a run folder with one")
    return max(checkpoints, key=lambda c: (c[1].get("knn", -1.0), c[1]["step"]))[0]


def committed_checkpoints(run_uri: str) -> list[tuple[str, dict[str, float]]]:
    """Returns (URI, metrics as reported) of a run's checkpoints, oldest first; [] if none."""
    # Here, because evaluation of a plain checkpoint folder should not wait for Ray's import.
    from ray.train import Result

    # It announces every list it reads, in eight lines.
    logging.getLogger("ray.train.v2._internal.execution.checkpoint").setLevel(logging.WARNING)
    path, filesystem = ray_storage(run_uri)
    try:
        result = Result.from_path(path, storage_filesystem=filesystem)
    except RuntimeError:  # no such folder, or no checkpoint was ever committed there
        return []
    found = [
        (join_uri(run_uri, Path(checkpoint.path).name), dict(metrics))
        for checkpoint, metrics in result.best_checkpoints or []
    ]
    return sorted(found, key=lambda item: item[1]["step"])


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
    objective = build_objective(
        config.objective.name,
        model=config.model_settings,
        objective=config.objective_settings,
    )
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
