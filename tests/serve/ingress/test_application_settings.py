"""Settings of all applications: validation, the API key, and Serve's options."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve.embeddings.settings import ServeSettings
from serve.ingress.deployment import MAX_ONGOING, ingress_options, read_api_key
from serve.lm.settings import LMSettings
from serve.planning.settings import PlanningSettings

PAGE = "https://app.example.org"
NAMES: dict[Any, dict[str, str]] = {
    ServeSettings: {"artifact": "a"},
    LMSettings: {"model": "m"},
    PlanningSettings: {"agent": "a"},
}
"""The settings of every application, with what they need."""


def test_serve_s_own_limits_stand_behind_ours() -> None:
    settings = ServeSettings(artifact="a", ingress_replicas=3, access_log=True)
    options = ingress_options(settings)
    assert (options["max_ongoing_requests"], options["max_queued_requests"]) == (MAX_ONGOING, -1)
    assert settings.max_queued + settings.max_streams + 600 < MAX_ONGOING
    assert options["num_replicas"] == 3
    assert options["logging_config"] == {"enable_access_log": True}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "not set here, or empty"),
        ("\n", "not set here, or empty"),
        ("two words", "no client can send"),
        ("line\nbreak", "no client can send"),
        ("Bearer k", "no client can send"),
        ("zero\x00", "no client can send"),
        ("schl\xfcssel", "no client can send"),
        ("\ufeffk", "no client can send"),
        ('"k"', "in quotes"),
        ("'k'", "in quotes"),
    ],
)
@pytest.mark.parametrize("kind", NAMES)
def test_a_key_that_no_client_can_send_stops_the_server(
    kind: Any, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = NAMES[kind]
    settings = kind(**names, api_key_env="RAYJEPA_TEST_KEY")
    monkeypatch.delenv("RAYJEPA_TEST_KEY", raising=False)
    with pytest.raises(ValueError, match="RAYJEPA_TEST_KEY"):
        read_api_key(settings)
    if "\x00" not in value:
        monkeypatch.setenv("RAYJEPA_TEST_KEY", value)
    else:
        monkeypatch.setattr("os.environ", {"RAYJEPA_TEST_KEY": value})
    with pytest.raises(ValueError, match=message) as caught:
        read_api_key(settings)
    assert value.strip() not in str(caught.value) or not value.strip()  # it lands in logs


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("api_key_env", "", "name of an environment variable"),
        ("api_key_env", "sk-abc", "name of an environment variable"),
        ("cors_origins", "https://a.org/app", "not an origin"),
        ("cors_origins", ["a.org"], "not an origin"),
        ("cors_origins", "https://u:p@a.org", "not an origin"),
        ("max_arriving_bytes", 10, "max_request_bytes"),
        ("body_timeout_s", 0, "greater than 0"),
        ("model", " \n", "at least 1 character"),
    ],
)
@pytest.mark.parametrize("kind", NAMES)
def test_invalid_settings_are_refused(kind: Any, name: str, value: Any, message: str) -> None:
    names = NAMES[kind]
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(names | {name: value})


def test_settings_are_stripped() -> None:
    settings = ServeSettings.model_validate(
        {
            "artifact": " s3://bucket/encoder\n",
            "model": "tiny\n",
            "allow_hosts": " A.org, ,.b.org:8080\n",
            "cors_origins": "https://App.example.org/, http://localhost:3000 ,null",
        }
    )
    assert (settings.artifact, settings.model) == ("s3://bucket/encoder", "tiny")
    assert settings.allow_hosts == ("a.org", ".b.org:8080")
    assert settings.cors_origins == (PAGE, "http://localhost:3000", "null")
    lm = LMSettings.model_validate({"model": "m\n", "store": " s3://b/s ", "name": "n "})
    assert (lm.model, lm.store, lm.name) == ("m", "s3://b/s", "n")
