"""Request and response types of the planning API. Unknown fields are refused."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, WithJsonSchema, model_validator

from serve.ingress.bodies import RequestModel
from serve.replicas.model_routes import ModelEntry

_FRAME_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1, "description": "data URI or base64 of an image file"},
        {"type": "object", "required": ["image"], "properties": {"image": {"type": "string"}}},
        {
            "type": "object",
            "description": "base64 of uint8 RGB values, by rows, of exactly the model's size",
            "required": ["raw"],
            "properties": {"raw": {"type": "string"}},
        },
    ]
}
Frame = Annotated[Any, WithJsonSchema(_FRAME_SCHEMA)]
"""A picture in a form that `frames.py` reads."""
GREATEST = 1e6
"""Greatest number of an action, a zone or a weight, so that nothing that is computed of them
overflows."""
MOST_STEPS, MOST_BUDGET = 10_000, 10**9
"""Greatest numbers that are read; what a server allows is less."""
Number = Annotated[float, Field(ge=-GREATEST, le=GREATEST)]
_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")


class Output(RequestModel):
    """Fields of both requests that say who answers, and how."""

    model: str | None = None
    """A name from `GET /v1/models`; may be left out."""
    encoding_format: Literal["float", "base64"] = "float"
    """How embeddings are written: JSON numbers, or the float32 values little-endian in base64."""
    user: str | None = None
    """Ignored."""


class PlanRequest(Output):
    """Body of `POST /v1/plan`."""

    observation: Frame | list[Frame]
    """What is seen now; a list for a model whose states are made of several frames, the newest
    last. Fewer than `history` are taken as standing still before."""
    goal: Frame
    """What is wanted, as it would be seen."""
    session: str | None = None
    """Name of the episode, chosen by the client: the search starts from what is left of the last
    plan of this name with the same goal. Letters, digits and `_.:-`, at most 128."""
    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Actions that may still be taken; the plan is no longer."""
    budget: int | None = Field(None, ge=1, le=MOST_BUDGET)
    """Imagined steps that the plan may cost."""
    method: str | None = None
    """Method of the search, one of the model's `methods`."""
    zones: list[Annotated[list[Number], Field(min_length=4, max_length=4)]] | None = None
    """Rectangles to stay out of, each [left, top, right, bottom] in the units of the places that
    the model reads off its latents."""
    caution: float | None = Field(None, ge=0, le=GREATEST)
    """Weight of the disagreement of the model's predictors."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.session is not None and not _SESSION.fullmatch(self.session):
            told = "1 to 128 letters, digits and _.:-, the first a letter or digit"
            raise ValueError(f"session: needs {told}")
        for number, (left, top, right, bottom) in enumerate(self.zones or ()):
            if not (left < right and top < bottom):
                raise ValueError(f"zones.{number}: needs left < right and top < bottom")
        return self


class PredictRequest(Output):
    """Body of `POST /v1/predict`."""

    frames: Frame | list[Frame]
    """Where imagination starts; in a list followed by what was seen after each action, as far as
    that is known. With a history, the first `history` frames are where it starts."""
    actions: list[list[Number]] = Field(min_length=1)
    """What is done, one action a step."""
    goal: Frame = None
    """What is wanted, as it would be seen; the energy then is the distance to it."""


class Used(BaseModel):
    """What an answer cost."""

    imagined_steps: int


class SessionState(BaseModel):
    """What was known of a session."""

    id: str
    step: int
    """Plans that it had before, with this goal; 0 if it begins, or was forgotten."""


class Path(BaseModel):
    """What is expected to happen, step by step."""

    actions: list[list[float]]
    costs: list[float]
    """What each step costs, as the search judged it."""
    embeddings: list[list[float]] | str
    """The latents that are expected after each action; base64 text if asked for."""
    shape: list[int]
    """Shape of `embeddings`."""
    distances: list[float]
    """Distance of each of them to the goal's latent."""
    places: list[list[float]] | None = None
    """Places that are read off them, where the model can."""
    disagreement: list[float] | None = None
    """How far the predictors of an ensemble are apart."""


class PlanResponse(BaseModel):
    """Reply of `POST /v1/plan`."""

    object: Literal["plan"] = "plan"
    model: str
    fingerprint: str
    action: list[float]
    """What to do now."""
    path: Path
    energy: float
    """Distance of the imagined end to the goal, in the space of the latents."""
    session: SessionState | None = None
    surprise: float | None = None
    """Distance of the observation from what the session's last plan expected; absent in a session's
    first step."""
    usage: Used


class PredictResponse(BaseModel):
    """Reply of `POST /v1/predict`."""

    object: Literal["prediction"] = "prediction"
    model: str
    fingerprint: str
    embeddings: list[list[float]] | str
    """The latents that are expected after each action; base64 text if asked for."""
    shape: list[int]
    """Shape of `embeddings`."""
    energy: float | None
    """Distance of the last one to the goal; without a goal the mean of `errors`; null where neither
    a goal nor a further frame is given."""
    errors: list[float] | None = None
    """Distance of each further frame's latent from the one that was expected."""
    distances: list[float] | None = None
    """Distance of each expected latent to the goal's."""
    places: list[list[float]] | None = None
    disagreement: list[float] | None = None
    usage: Used


class Model(ModelEntry):
    """What `GET /v1/models` tells of an agent."""

    world: str
    image_size: list[int]
    """Height and width of an observation, pixels."""
    history: int
    """Frames that a state is made of."""
    dimensions: int
    """Length of an embedding, which is the whole state."""
    action_width: int
    """Numbers of one action."""
    actions: dict[str, Any]
    """What else is known of the actions: `longest`, their greatest Euclidean length, or `choices`,
    all that there are."""
    methods: list[str]
    judged_by: Literal["critic", "distance"]
    """What stands for the way that is left to the goal."""
    predictors: int
    places: bool
    """Whether places can be read off the latents, which `zones` needs."""
    task: dict[str, Any]
    """The fields of a plan's request that hold unless it says otherwise."""
