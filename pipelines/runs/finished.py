"""A run that has ended, as another run starts from it: its folder, its best checkpoint, its
settings."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_list import NAME, committed_checkpoints, resolve_checkpoint
from pipelines.runs.checkpoints import CheckpointError, read_config, read_state
from pipelines.runtime.uris import local_copy, open_uri

TELLING = {
    "sweep.json": "a sweep; name one of its runs, {uri}/runs/trial_<number>",
    "model.safetensors": "an artifact, which has only the encoder; name the run it was exported "
    "from",
    "manifest.json": "a data set; name the folder of a run",
}
"""Files by which something that is no run is recognised, and what an error calls it."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a run left behind."""

    uri: str
    """Folder of the run."""
    checkpoint: str
    """The checkpoint that evaluate, export and serve take: the best one, or the one named."""
    step: int
    """Its step."""
    manifest_hash: str
    """Identity of the data it was trained on."""
    config: PretrainConfig


def find_finished(uri: str, flag: str) -> FinishedRun:
    """Finds a finished run, or a checkpoint of any run.

    Args:
        uri: folder of a run, which must have reached its last step, or of a checkpoint.
        flag: flag that names it, for errors.

    Raises:
        CheckpointError: there is no run, it has not finished, or its checkpoint does not load.
    """
    uri = uri.rstrip("/")
    fs, path = open_uri(uri)
    for name, what in TELLING.items():
        if fs.exists(f"{path}/{name}"):
            raise CheckpointError(f"{flag} {uri}: {what.format(uri=uri)}")
    named = bool(fs.exists(f"{path}/state.json") or NAME.fullmatch(uri.rpartition("/")[2]))
    try:
        if not named:
            _require_finished(uri)
        checkpoint = resolve_checkpoint(uri)
        with local_copy(checkpoint, "*.json") as folder:
            state, config = read_state(folder, checkpoint), read_config(folder, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{flag} {error}") from error
    return FinishedRun(
        uri=checkpoint.rpartition("/")[0],
        checkpoint=checkpoint,
        step=state.step,
        manifest_hash=state.manifest_hash,
        config=config,
    )


def _require_finished(uri: str) -> None:
    found = committed_checkpoints(uri)
    if not found:
        return  # `resolve_checkpoint` says what is wrong
    newest = found[-1][0]
    with local_copy(newest, "*.json") as folder:
        step, steps = read_state(folder, newest).step, read_config(folder, newest).run.steps
    if step < steps:
        raise CheckpointError(
            f"{uri}: the run has not finished (step {step} of {steps}).\n"
            f"Let it finish, or name a checkpoint of it: {newest}"
        )
