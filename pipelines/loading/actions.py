"""The actions between the frames of a clip; numpy and Arrow only.

Shape suffixes: N segments, T frames of a clip, A numbers of one frame's action.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.config.train import PretrainConfig
from pipelines.dataset.row_groups import read_row_group
from pipelines.dataset.shards import Manifest
from pipelines.runtime.uris import open_uri

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


class ActionError(ValueError):
    """A segment has no actions, or not those that the objective takes."""


@dataclass(frozen=True, kw_only=True)
class ActionReader:
    """Reads what was done between each frame of a clip and the next."""

    width: int
    """Numbers that the objective takes between two frames of a clip."""
    stride: int
    """Distance of these two frames, in frames of the segment; their actions stand side by side."""

    @property
    def per_frame(self) -> int:
        """A, the numbers of one frame's action."""
        return self.width // self.stride

    def between(self, segments: pa.Table, frames_NT: I32) -> F32:
        """Returns the actions between the frames of a clip of each segment.

        Args:
            segments: rows with `actions`, `sample_id` and `source_uri`.
            frames_NT: numbers of the clip's frames in its segment.

        Returns:
            float32 [N, T - 1, width]. NaN where the clip repeats the last frame of a segment that
            is too short for it, because nothing is known of what happened then.

        Raises:
            ActionError: a segment has no actions, too many or too few numbers, or NaN or infinity
                among them; it is named.
        """
        rows = zip(segments["actions"].combine_chunks(), frames_NT, strict=True)
        return np.stack([self._of_clip(row, frames_T, segments, number)
                         for number, (row, frames_T) in enumerate(rows)])  # fmt: skip

    def _of_clip(self, row: pa.ListScalar, frames_T: I32, segments: pa.Table, number: int) -> F32:
        numbers = None if row.values is None else row.values.flatten().to_numpy()
        found = 0 if numbers is None else len(numbers) // len(row.values)
        if numbers is None or found != self.per_frame:
            told = _told(found, self)
            raise ActionError(f"{segments['source_uri'][number].as_py()}: {told}")
        actions_FA = numbers.reshape(-1, found)
        _check_finite(actions_FA[: frames_T[-1]], frames_T[0], segments, number)
        between = np.full((len(frames_T) - 1, self.width), np.nan, np.float32)
        for place, (first, after) in enumerate(itertools.pairwise(frames_T)):
            if after - first == self.stride:
                between[place] = actions_FA[first:after].reshape(-1)
        return between


def _check_finite(actions_FA: F32, first: int, segments: pa.Table, number: int) -> None:
    """Raises ActionError if an action from frame number `first` on is no number."""
    wrong_F = np.flatnonzero(~np.isfinite(actions_FA[first:]).all(axis=1))
    if len(wrong_F):
        raise ActionError(
            f"{segments['source_uri'][number].as_py()}: the action of frame {first + wrong_F[0]} "
            "is NaN or infinite.\nIngest the videos again, with numbers in NAME.actions.npy."
        )


def action_reader(cfg: PretrainConfig) -> ActionReader | None:
    """Returns the reader of a run's actions; None if its objective takes none."""
    if not cfg.objective.registered.actions:
        return None
    return ActionReader(width=cfg.objective.action_width, stride=cfg.clip.stride)


def check_actions(cfg: PretrainConfig, uri: str, manifest: Manifest, flag: str) -> None:
    """Checks the first segments of a set, so that most mistakes are told before training starts.

    Raises:
        ValueError: the first has no actions, or others than the objective takes; or all that are
            read together are too short to show what an action did.
    """
    reader = action_reader(cfg)
    if reader is None:
        return
    fs, root = open_uri(uri)
    rows = read_row_group(
        fs, root, manifest.shards[0].file, 0, ("actions", "source_uri", "num_frames")
    )
    try:
        reader.between(rows.slice(0, 1), np.zeros((1, 1), np.int32))
    except ActionError as error:
        raise ValueError(f"{flag}: {error}") from error
    longest = max(rows["num_frames"].to_pylist())
    needed = cfg.objective.history * cfg.clip.stride + 1
    if longest < needed:
        raise ValueError(
            f"{flag}: the longest of the first {len(rows)} segments of {uri} has {longest} frames, "
            f"but a state and\nwhat an action makes of it take {needed} (--objective.history "
            f"{cfg.objective.history}, --clip.stride {cfg.clip.stride}). Ingest longer videos."
        )


def _told(found: int, reader: ActionReader) -> str:
    if not found:
        return (
            "the segment has no actions, which --objective.name worldmodel learns from.\n"
            "Ingest videos that have NAME.actions.npy beside them (docs/planning.md)."
        )
    return (
        f"{found} numbers a frame, but --objective.action-width {reader.width} over --clip.stride "
        f"{reader.stride} takes {reader.per_frame}.\n"
        f"Set --objective.action-width {found * reader.stride}."
    )
