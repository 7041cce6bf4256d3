"""An agent on disk: all that plans, without the shards and checkpoints that it came from.

    DIR/agent.json            what the parts are, the world, its actions and the task
    DIR/weights.safetensors   tensors of all parts, named part.tensor

`pipelines.plan_episodes` writes one to OUT/agent, and `load_agent` reads it:

    saved = load_agent("plans/agent")
    agent = saved.agent(dataclasses.replace(saved.task, budget=960))
    agent.begin(goal_frames)                         # uint8 [B, 3, H, W]
    plans = agent.plan(frames, torch.arange(B))      # [B, horizon, A]; the first action is taken

`Agent` keeps the goals and plans of its episodes, so concurrent requests each build one of their
own, which costs microseconds: the weights are shared.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from models.digests import DamagedFileError, digest_of_bytes
from models.encoders.linear import use_linear
from models.file_systems import read_bytes
from models.objectives.registry import build_objective
from models.planning.actors.space import ActionSpace
from models.planning.agent import Agent, build_agent
from models.planning.configurator import Rules, TaskSpec, configure
from models.planning.costs.critic import Critic
from models.planning.costs.intrinsic import goal_distance
from models.planning.costs.slow_distance import SlowDistance
from models.planning.world_model.readout import Readout
from models.planning.world_model.world_model import WorldModel

FORMAT = 1
"""Version of the format."""
DESCRIPTION, WEIGHTS = "agent.json", "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class SavedAgent:
    """The parts of an agent, with frozen weights on the CPU."""

    model: WorldModel
    settings: Mapping[str, Any]
    """What `models.objectives.registry.build_objective` builds the model from: `name`, `model` and
    `objective`."""
    critic: Critic | None
    """None judges by distance."""
    distance: SlowDistance | None = None
    """How far an imagined step is from the goal, where there is no critic; None for the distance
    of the latents."""
    readout: Readout | None
    """Maps latents to places in pixels; needed for zones, and to draw what was imagined."""
    actions: ActionSpace
    world: str
    """Name of the world, such as `tworooms`."""
    frame: tuple[int, int]
    """Height and width of an observation, pixels."""
    task: TaskSpec
    """What the agent was tried on; requests may replace its fields."""
    rules: Rules = field(default_factory=Rules)
    """The numbers that the configurator goes by."""
    provenance: Mapping[str, Any]
    """Where the weights come from; anything that JSON can hold."""

    def agent(self, task: TaskSpec | None = None, *, seed: int = 0) -> Agent:
        """Builds an agent of its own for a task.

        Raises:
            ValueError: the task's budget is too small for any search.
        """
        return build_agent(
            configure(task or self.task, self.rules),
            self.model,
            limit=self.actions.limited,
            action_width=self.actions.width,
            critic=self.critic,
            distance=self.distance or goal_distance,
            readout=self.readout,
            choices_KA=self.actions.choices_KA,
            seed=seed,
        )


def agent_files(saved: SavedAgent) -> dict[str, bytes]:
    """Returns the files by name, in the order in which they are to be written.

    The description comes last: a folder without one holds no agent.
    """
    tensors = {f"model.{name}": value for name, value in saved.model.state_dict().items()}
    if saved.critic is not None:
        tensors |= {f"critic.{name}": value for name, value in saved.critic.state_dict().items()}
    if saved.distance is not None:
        tensors["distance.features"] = saved.distance.features_DF
        if saved.distance.goals is not None:
            tensors["distance.goals"] = saved.distance.goals.weight_D2
    if saved.readout is not None:
        tensors["readout.weight"] = saved.readout.weight_D2
    weights = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
    description = {
        "format": FORMAT,
        "world": saved.world,
        "frame": saved.frame,
        "actions": dataclasses.asdict(saved.actions),
        "task": dataclasses.asdict(saved.task),
        "rules": dataclasses.asdict(saved.rules),
        "model": dict(saved.settings),
        "provenance": dict(saved.provenance),
        "sha256": digest_of_bytes(weights),
    }
    return {WEIGHTS: weights, DESCRIPTION: json.dumps(description, indent=1).encode()}


def load_agent(uri: str) -> SavedAgent:
    """Loads an agent from a local or remote folder.

    Raises:
        FileNotFoundError: the folder holds no agent, or not all of it.
        ValueError: it is of another format, or does not fit together.
        DamagedFileError: a file is not as it was saved.
    """
    folder = uri.rstrip("/")
    found = _described(folder)
    weights = _read(folder, WEIGHTS)
    try:
        if digest_of_bytes(weights) != found["sha256"]:
            raise DamagedFileError(f"{folder}/{WEIGHTS} is not the file that was saved")
        return _assembled(found, safetensors.torch.load(weights))
    except DamagedFileError:
        raise
    except MISFITS as error:
        told = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder}/{DESCRIPTION} describes no agent ({type(error).__name__}: {told})"
        ) from error


MISFITS = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)
"""What is raised of a description that was written by hand, or by another version."""


def _described(folder: str) -> dict[str, Any]:
    try:
        found = json.loads(_read(folder, DESCRIPTION))
    except ValueError as error:
        raise DamagedFileError(f"{folder}/{DESCRIPTION} is no JSON: {error}") from error
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise ValueError(f"{folder}: format {version}, this version reads {FORMAT}")
    return dict(found)


def _read(folder: str, name: str) -> bytes:
    try:
        return read_bytes(f"{folder}/{name}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{folder}: no {name}, so no agent. `python -m pipelines.plan_episodes` writes one to "
            "OUT/agent."
        ) from error


def _assembled(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SavedAgent:
    settings, task = found["model"], found["task"]
    model = build_objective(
        settings["name"], model=settings["model"], objective=settings["objective"]
    )
    if not isinstance(model, WorldModel):
        raise ValueError(f"{type(model).__name__} is no world model")
    model.load_state_dict(_part(tensors, "model"))
    use_linear(model.predictors, least=0)  # a search gives them thousands of rows
    readout, features = tensors.get("readout.weight"), tensors.get("distance.features")
    return SavedAgent(
        model=model.eval().requires_grad_(False),
        settings=settings,
        critic=_critic(_part(tensors, "critic")),
        distance=None if features is None else _distance(features, tensors.get("distance.goals")),
        readout=None if readout is None else Readout(weight_D2=readout),
        actions=_actions(found["actions"]),
        world=found["world"],
        frame=(found["frame"][0], found["frame"][1]),
        task=TaskSpec(**task | {"zones": tuple(map(tuple, task["zones"]))}),
        rules=Rules(**found["rules"]),
        provenance=found["provenance"],
    )


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{part}."): value
        for name, value in tensors.items()
        if name.startswith(f"{part}.")
    }


def _actions(found: Mapping[str, Any]) -> ActionSpace:
    choices = found.get("choices")  # JSON knows lists, and agents of before have none
    rows = None if choices is None else tuple(map(tuple, choices))
    return ActionSpace(**{**found, "choices": rows})


def _distance(features_DF: Tensor, goals: Tensor | None) -> SlowDistance:
    readout = None if goals is None else Readout(weight_D2=goals)
    return SlowDistance(features_DF=features_DF, goals=readout)


def _critic(tensors: Mapping[str, Tensor]) -> Critic | None:
    if not tensors:
        return None
    critic = Critic(len(tensors["pairs.mean_D"]), width=len(tensors["pairs.layers.0.bias"]))
    critic.load_state_dict(tensors)
    return critic.eval().requires_grad_(False)
