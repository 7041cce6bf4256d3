"""The routes that list what an application serves: `/v1/models` and `/v1/models/{name}`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, Literal, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict


class ModelEntry(BaseModel):
    """One entry of `GET /v1/models`; each application adds what it knows of its models."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """The model's name in requests."""
    object: Literal["model"] = "model"
    created: int
    """Unix time at which this replica was started."""
    fingerprint: str
    """Digest of everything that makes it another model."""
    owned_by: str = "rayjepa"


Entry = TypeVar("Entry", bound=ModelEntry)


class ModelList(BaseModel, Generic[Entry]):
    """Reply of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Entry]


def add_model_routes(
    app: FastAPI, entry: type[Entry], find: Callable[[str | None], Awaitable[Entry]]
) -> None:
    """Adds the routes to an application.

    Args:
        app: takes the routes.
        entry: what is told of a model.
        find: returns the entry of a name, and without one that of the model that answers now; it
            raises `ApiError` if no model has the name.
    """

    @app.get("/v1/models", response_model=ModelList[entry])  # type: ignore[valid-type]
    async def list_models() -> ModelList[Entry]:
        """Lists the models of this server."""
        return ModelList(data=[await find(None)])

    @app.get("/v1/models/{name:path}", response_model=entry)
    async def get_model(name: str) -> Entry:
        """Describes one model."""
        return await find(name)
