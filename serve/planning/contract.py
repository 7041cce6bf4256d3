"""What ingress replicas and planners exchange: plain values, so that an ingress needs no torch.

Shape legend: H height, W width, C channels, h frames of the model's history, T frames, K actions of
a prediction or steps of a plan, A action width, D state width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.media.preprocessing import Preprocessing

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PLANNER = "Planner"
"""Name of the planner's deployment."""


@dataclass(frozen=True, kw_only=True)
class PlanCard:
    """What an ingress replica knows about an agent."""

    name: str
    fingerprint: str = ""
    """Digest of the agent's files and its name. Calls name it, and a planner refuses any but its
    own."""
    world: str
    """Name of the world that it was trained in."""
    preprocessing: Preprocessing
    """How a picture becomes an observation. The model normalises by itself."""
    history: int
    """h, frames that a state is made of."""
    state_width: int
    """D."""
    action_width: int
    """A."""
    actions: Mapping[str, Any]
    """Fields of the agent's action space."""
    methods: tuple[str, ...]
    """Methods of search."""
    judged_by: Literal["critic", "distance"]
    """What stands for the way that is left to the goal."""
    predictors: int
    """Predictors of the ensemble."""
    reads_places: bool
    """Whether it reads places off latents, which zones need."""
    task: Mapping[str, Any]
    """Fields of `models.planning.configurator.TaskSpec` that hold unless a request says
    otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanQuery:
    """A request for a plan."""

    observation_hHWC: Pixels
    """The last h frames, the newest last."""
    goal_HWC: Pixels
    session: str | None
    """Name of the session, which the last plan is remembered by; None remembers nothing."""
    task: Mapping[str, Any]
    """Fields of the task that replace the agent's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Imagined:
    """What a world model expects of a sequence of actions, step by step."""

    latents_KD: Floats
    """Mean over the predictors."""
    goal_K: Floats | None
    """Distance to the goal's latent; None without a goal."""
    disagreement_K: Floats | None
    """How far the predictors are apart; None of a single one."""
    places_K2: Floats | None
    """Places that are read off the latents; None without a readout."""

    @property
    def arrays(self) -> list[Floats]:
        """Everything that there is."""
        found = (self.latents_KD, self.goal_K, self.disagreement_K, self.places_K2)
        return [array for array in found if array is not None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Answer to a `PlanQuery`."""

    actions_KA: Floats
    """The first of them is to be taken now."""
    imagined: Imagined
    costs_K: Floats
    """What each step costs, as the search judged it."""
    surprise: float | None
    """Distance of the observation's latent from the one that the session's last plan expected; None
    in its first step."""
    step: int
    """Plans that the session had before this one."""
    imagined_steps: int
    """Steps that were imagined to find it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictQuery:
    """A request for what actions lead to."""

    frames_THWC: Pixels
    """The first h are the state where imagination starts. Those after them are what came after
    each action."""
    actions_KA: Floats
    goal_HWC: Pixels | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Answer to a `PredictQuery`."""

    imagined: Imagined
    errors_K: Floats
    """Distance of the state at each further frame from the one that was expected; as many as there
    are such frames."""
