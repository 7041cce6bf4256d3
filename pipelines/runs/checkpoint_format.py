"""The files of one checkpoint folder: written by several processes, read by one.

    config.json                            the run's configuration
    state.json                             step, position in the data, metrics, manifest hash
    model-00000-of-00002.safetensors       weights of the objective, target encoder included
    optimizer-00000-of-00002.safetensors   optimizer state by parameter name
    loop-00000-of-00002.safetensors        random number generators and meters
    digests-00000-of-00002.json            SHA-256 of the files that this process wrote

Each of W processes writes its share of the tensors to its own files, without communicating with the
others; Ray Train merges the folders. A share is some of the tensors or, if the model is sharded,
the rows that the process holds of every tensor (`models.tensor_rows`). There is no pickle, so
reading a checkpoint runs no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.digests import DamagedFileError, check_file, read_digests, write_digests
from models.shards import is_first_replica, local
from models.tensor_rows import Piece, join, load_pieces, piece_of, save_pieces
from pipelines.config.as_json import from_json, to_json
from pipelines.config.train import PretrainConfig

FORMAT = 3
READABLE = (2, FORMAT)
"""Versions that are read. In version 2 every tensor is whole in one file."""
GROUPS = ("model", "optimizer", "loop")
REPORTED = ("knn", "loss", "fixed_rankme", "lidar")
"""Metrics that are reported to Ray Train with a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the run stops rather than silently start over."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, cut, or not as it was saved.

    Args:
        checkpoint: The checkpoint's URI, or its folder.
        fault: What is wrong, beginning with the name of the file.
    """

    def __init__(self, checkpoint: str, fault: str) -> None:
        super().__init__(
            f"{checkpoint}/{fault}.\n"
            "Name another checkpoint of the run, or copy this one from where it is whole."
        )
        self.checkpoint, self.fault = checkpoint, fault

    def __reduce__(self) -> Any:
        """Survives pickling, on the way from a worker."""
        return type(self), (self.checkpoint, self.fault)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """Contents of state.json: the step of the run and the metrics at that step."""

    step: int
    """Optimizer steps taken."""
    position: int
    """Samples consumed (step x batch size), which alone gives the position in the data."""
    epoch: float
    """Position in epochs."""
    manifest_hash: str
    """Identity of the training shards."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """The newest value of every metric."""
    strikes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Consecutive readings that looked collapsed, by watched feature."""
    world_size: int = 1
    """Number of processes that wrote the checkpoint."""
    format: int = FORMAT
    """Version of this layout."""


Share = Mapping[str, Mapping[str, Piece]]
"""What one process writes of a checkpoint: by group of `GROUPS` and by name."""


def share_of(tensors: Mapping[str, Mapping[str, Tensor]], rank: int, world_size: int) -> Share:
    """Copies one process's share to the host's memory, so that training can go on as it is written.

    Args:
        tensors: Named tensors by group of `GROUPS`. Those of `model` and `optimizer` are the same
            on every process and are divided among them, or are sharded; `loop` belongs to this
            process.
        rank: Rank of this process.
        world_size: Number of processes.
    """
    return {
        group: {
            name: piece_of(tensors[group][name])
            for name in (named if group == "loop" else _mine(named, rank, world_size))
        }
        for group, named in tensors.items()
    }


def _mine(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> list[str]:
    """Names of the tensors of which process `rank` writes something."""
    copied = {name: t for name, t in tensors.items() if not isinstance(t, DTensor)}
    sharded = {name: t for name, t in tensors.items() if isinstance(t, DTensor)}
    held = [n for n, t in sharded.items() if is_first_replica(t) and local(t).numel()]
    return _shares(copied, world_size)[rank] + held


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: CheckpointState,
    config: PretrainConfig,
    *,
    rank: int = 0,
) -> None:
    """Writes one process's share of a checkpoint; arguments as of `share_of` and `save_share`."""
    share = share_of(tensors, rank, state.world_size)
    save_share(folder, share, state, config, rank=rank)


def save_share(
    folder: Path, share: Share, state: CheckpointState, config: PretrainConfig, *, rank: int
) -> None:
    """Writes one process's share of a checkpoint into `folder`, with the digests of its files.

    Args:
        folder: Existing folder; the processes' folders are merged afterwards.
        share: Result of `share_of`.
        state: Contents of state.json, which rank 0 writes.
        config: Contents of config.json, which rank 0 writes.
        rank: Rank of this process among `state.world_size`.
    """
    names = [file_name(group, rank, state.world_size) for group in GROUPS]
    for group, name in zip(GROUPS, names, strict=True):
        save_pieces(share[group], folder / name)
    if rank == 0:
        (folder / "config.json").write_text(to_json(config))
        (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=2))
        names += ["config.json", "state.json"]
    write_digests(folder, names, digests_name(rank, state.world_size))


def _shares(tensors: Mapping[str, Tensor], parts: int) -> list[list[str]]:
    """Divides names into `parts` of about equal bytes, in the same way on every process."""
    names: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        lightest = loads.index(min(loads))
        names[lightest].append(name)
        loads[lightest] += tensors[name].nbytes
    return names


def file_name(group: str, rank: int, world_size: int) -> str:
    """Name of the file with one process's share of a group."""
    return f"{group}-{rank:05d}-of-{world_size:05d}.safetensors"


def digests_name(rank: int, world_size: int) -> str:
    """Name of the file with the digests of one process's files."""
    return f"digests-{rank:05d}-of-{world_size:05d}.json"


def parse_state(text: str) -> CheckpointState:
    """Parses the text of state.json.

    Raises:
        ValueError: It is damaged, or has another format version.
    """
    try:
        state = CheckpointState(**json.loads(text))
    except TypeError as error:
        raise ValueError(f"not what a checkpoint holds: {error}") from error
    if state.format not in READABLE:
        raise ValueError(f"checkpoint format {state.format}, expected {FORMAT}")
    for name, least in (("step", 0), ("position", 0), ("world_size", 1)):
        value = getattr(state, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}")
    return state


def read_state(folder: Path, uri: str | None = None) -> CheckpointState:
    """Reads state.json of a checkpoint folder.

    Args:
        folder: The folder, or a local copy of it.
        uri: The checkpoint's URI, if `folder` is a copy; errors name it.

    Raises:
        CheckpointError: It is absent, damaged, or has another format version.
    """
    with _naming(folder, "state.json", uri) as path:
        return parse_state(path.read_text())


def read_config(folder: Path, uri: str | None = None) -> PretrainConfig:
    """Reads config.json of a checkpoint folder; arguments as of `read_state`.

    Raises:
        CheckpointError: It is absent, damaged, or has keys that this version does not know.
    """
    with _naming(folder, "config.json", uri) as path:
        return from_json(PretrainConfig, path.read_text())


def load_tensors(
    folder: Path,
    group: str,
    world_size: int,
    uri: str | None = None,
    like: Callable[[str], Tensor | None] = lambda name: None,
) -> dict[str, Tensor]:
    """Reads the tensors of one group onto the CPU, from the shares of all processes.

    Args:
        folder: The checkpoint's folder, or a local copy of it.
        group: Entry of `GROUPS`.
        world_size: Number of the processes that wrote it.
        uri: The checkpoint's URI, if `folder` is a copy; errors name it.
        like: Gives a tensor for a name. If that is sharded, the one that is read is sharded in the
            same way, and lies on its device; only the rows of this process are read.

    Raises:
        CheckpointError: A share is missing, cut short, not a safetensors file, or not as it was
            saved.
    """
    pieces: dict[str, list[Piece]] = {}
    for rank in range(world_size):
        for name, piece in _load_pieces(folder, group, rank, world_size, uri).items():
            pieces.setdefault(name, []).append(piece)
    try:
        return {name: join(found, like(name)) for name, found in pieces.items()}
    except ValueError as error:
        raise DamagedCheckpointError(uri or str(folder), f"{group}: {error}") from error


def load_share(
    folder: Path, group: str, rank: int, world_size: int, uri: str | None = None
) -> dict[str, Tensor]:
    """Reads the share of one group that process `rank` of `world_size` wrote.

    Raises:
        CheckpointError: The file is missing, cut short, not a safetensors file, or not as it was
            saved.
    """
    found = _load_pieces(folder, group, rank, world_size, uri)
    return {name: piece.rows for name, piece in found.items()}


def _load_pieces(
    folder: Path, group: str, rank: int, world_size: int, uri: str | None
) -> dict[str, Piece]:
    with _naming(folder, file_name(group, rank, world_size), uri) as path:
        return load_pieces(path)


@contextlib.contextmanager
def _naming(folder: Path, name: str, uri: str | None) -> Iterator[Path]:
    """Yields the path of a file that agrees with its digest; errors name the checkpoint's URI.

    Raises:
        DamagedCheckpointError: The file is not there, not as it was saved, or does not load.
    """
    path = folder / name
    try:
        check_file(path, read_digests(folder, "digests-*.json"))
        yield path
    except DamagedFileError as error:
        raise DamagedCheckpointError(uri or str(folder), str(error)) from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DamagedCheckpointError(
            uri or str(folder), f"{name} does not load: {reason}"
        ) from error


def report_of(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metrics reported to Ray Train with a checkpoint, by which it ranks checkpoints.

    Args:
        step: Step of the checkpoint.
        values: Metrics read at exactly this step; only a probe of these weights may rank them.
    """
    reported = {k: v for k, v in values.items() if k in REPORTED}
    return {"step": step, "score": values.get("knn", -1.0), **reported}


def recover_report(state: CheckpointState, config: PretrainConfig) -> dict[str, Any]:
    """Rebuilds from a checkpoint's own files what `report_of` returned when it was saved."""
    run = config.run
    every = {"loss": run.log_every, "knn": run.probe_every}
    every |= dict.fromkeys(("fixed_rankme", "lidar"), run.rank_every)
    read = {
        name
        for name, steps in every.items()
        if steps and (state.step % steps == 0 or state.step == run.steps)
    }
    return report_of(state.step, {k: v for k, v in state.metrics.items() if k in read})
