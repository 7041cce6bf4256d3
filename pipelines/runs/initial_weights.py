"""`--run.init-from`: starts a run from another run's weights.

Image size and clip length may differ between the runs, because only position tables depend on them;
these are interpolated. Any other difference in shapes is refused before workers start, from the
headers of the files alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from models.encoders.positions import fit_table
from models.image_size import Grid
from models.objectives.objective import Objective
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_format import (
    CheckpointError,
    load_tensors,
    read_config,
    read_state,
)
from pipelines.runs.checkpoint_list import resolve_checkpoint
from pipelines.runs.checkpoints import flatten, load_weights, new_objective
from pipelines.runs.integrity import Shapes, read_shapes
from pipelines.runtime.uris import local_copy

TABLE = "pos_embed"
"""Last part of the names of position tables, in encoders, predictor and decoder."""
SHAPING = (
    *("model.encoder", "model.patch_size", "model.tubelet", "model.positions"),
    *("model.predictor_width", "model.predictor_depth"),
    *("objective.name", "objective.target", "objective.projector", "objective.regularize"),
    *("video_mask.kind", "video_mask.blocks"),
)
"""Settings that decide which weights an objective has, and their shapes."""


@dataclass(frozen=True)
class _Source:
    uri: str
    step: int
    world_size: int
    config: PretrainConfig


def grid_of(cfg: PretrainConfig) -> Grid:
    """The grid of tokens of a run's images or clips."""
    return cfg.model.grid


def check_initial(cfg: PretrainConfig) -> str | None:
    """Checks by shapes alone that the weights of `run.init_from` fit the run.

    Returns:
        A line for the user if positions will be fitted to another grid, else None.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or its weights do not fit.
        ValueError: The run's own objective cannot be built.
    """
    source = _find(cfg)
    with torch.device("meta"):
        objective = new_objective(cfg)
    try:
        found = read_shapes(source.uri)
    except ValueError as error:
        raise CheckpointError(f"--run.init-from {source.uri}: {error}") from error
    expected = {name: tuple(t.shape) for name, t in objective.state_dict().items()}
    _refuse_misfits(source, cfg, found, expected)
    old, new = grid_of(source.config), grid_of(cfg)
    if old == new:
        return None
    return (
        f"--run.init-from {source.uri}: trained on {old} tokens (time x rows x columns); its "
        f"positions are fitted to the {new} of this run"
    )


def load_initial(cfg: PretrainConfig, objective: Objective) -> str:
    """Loads the weights of `run.init_from` into an objective; raises like `check_initial`.

    Returns:
        A line for the user that names the checkpoint.
    """
    source = _find(cfg)
    with local_copy(source.uri, "digests-*.json", "model-*.safetensors") as folder:
        tensors = load_tensors(folder, "model", source.world_size, source.uri)
    old, new = grid_of(source.config), grid_of(cfg)
    if old != new:
        tensors |= {n: fit_table(tensors[n], old, new) for n in _tables(tensors)}
    expected = {name: tuple(t.shape) for name, t in objective.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    _refuse_misfits(source, cfg, found, expected)
    load_weights(objective, tensors, source.uri)
    return f"starting from the weights of {source.uri} (step {source.step})"


def _find(cfg: PretrainConfig) -> _Source:
    assert cfg.run.init_from
    try:
        uri = resolve_checkpoint(cfg.run.init_from)
        with local_copy(uri, "*.json") as folder:
            state, config = read_state(folder, uri), read_config(folder, uri)
    except CheckpointError as error:
        raise CheckpointError(f"--run.init-from: {error}") from error
    return _Source(uri, state.step, state.world_size, config)


def _tables(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.rpartition(".")[2] == TABLE]


def _refuse_misfits(source: _Source, cfg: PretrainConfig, found: Shapes, expected: Shapes) -> None:
    tables = set(_tables(expected)) & set(found)  # these are fitted to the grid
    wrong = [n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n)]
    wrong = [name for name in wrong if name not in tables]
    if not wrong:
        return
    shown = [f"{n} {found.get(n, 'absent')}, not {expected.get(n, 'there')}" for n in wrong[:3]]
    raise CheckpointError(
        f"--run.init-from {source.uri}: {len(wrong)} weights do not fit: {'; '.join(shown)}.\n"
        f"{_differing(source.config, cfg)}\n"
        "Take over these settings, or leave --run.init-from out; only the image size and the "
        "clip's length may differ."
    )


def _differing(saved: PretrainConfig, cfg: PretrainConfig) -> str:
    before, after = flatten(dataclasses.asdict(saved)), flatten(dataclasses.asdict(cfg))
    flags = [
        f"--{key.replace('_', '-')} was {before[key]}, is {after[key]}"
        for key in SHAPING
        if before[key] != after[key]
    ]
    return f"Settings that differ: {'; '.join(flags) or 'none that is known'}."
