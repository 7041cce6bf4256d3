"""The routes that list models, which every application has."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from serve.embeddings.frontend.schemas import Model as EncoderModel
from serve.ingress.application import add_error_handlers
from serve.ingress.errors import ApiError
from serve.lm.frontend.schemas import Model as LanguageModel
from serve.planning.frontend.schemas import Model as PlanningModel
from serve.replicas.model_routes import ModelEntry, add_model_routes

SHARED: dict[str, Any] = {"id": "a/b", "created": 7, "fingerprint": "f"}


def test_a_model_is_listed_and_found_by_its_name() -> None:
    app = FastAPI()

    async def find(name: str | None) -> ModelEntry:
        if name not in (None, "a/b"):
            raise ApiError(404, "model_not_found", "no", param="model")
        return ModelEntry(**SHARED)

    add_model_routes(app, ModelEntry, find)
    add_error_handlers(app)
    with TestClient(app) as http:
        (listed,) = http.get("/v1/models").json()["data"]
        assert http.get("/v1/models/a/b").json() == listed
        assert listed == SHARED | {"object": "model", "owned_by": "rayjepa"}
        gone = http.get("/v1/models/a")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("entry", [EncoderModel, LanguageModel, PlanningModel])
def test_every_application_s_entry_is_described(entry: type[ModelEntry]) -> None:
    async def find(name: str | None) -> ModelEntry:
        raise AssertionError(name)

    app = FastAPI()
    add_model_routes(app, entry, find)
    schema = app.openapi()["components"]["schemas"][entry.__name__]
    assert set(schema["properties"]) > {"id", "object", "created", "fingerprint", "owned_by"}
