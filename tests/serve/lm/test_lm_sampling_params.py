"""No sampling parameter is lost between the HTTP body and the sampler."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from helpers.lm.serving import MODEL, cluster, run, web
from models.sink_lm.engine.sampling_params import SamplingParams
from serve.lm.frontend.schemas import CompletionRequest, Generate

FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
SENT: dict[str, Any] = {
    "max_tokens": 3,
    "stop": ["never this"],
    "stop_token_ids": [7],
    "ignore_eos": True,
    "min_tokens": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.01,
    "seed": 11,
    "logit_bias": {"4": 1.5},
    "presence_penalty": 0.25,
    "frequency_penalty": 0.5,
    "logprobs": 2,
    "echo": True,  # with logprobs: prompt_logprobs
}
"""A value for each parameter that is not its default."""
NOT_SAMPLING = {
    *("model", "prompt", "stream", "stream_options", "n", "user", "session_id", "resume_at"),
    *("echo", "add_special_tokens", "parse_special"),
}
"""Fields of a completion that say what is read and how the reply looks."""


def test_every_parameter_has_a_field_of_its_name_and_every_field_is_known() -> None:
    body = set(CompletionRequest.model_fields)
    assert body - NOT_SAMPLING == FIELDS - {"prompt_logprobs"}
    assert FIELDS - body == {"prompt_logprobs"}
    assert FIELDS - set(Generate.model_fields) == {"logprobs", "prompt_logprobs"}


def test_every_parameter_reaches_the_sampler(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            engine, seen = made.replica._engine, []
            submit = engine.submit

            def spy(*args: Any) -> Any:
                generation = submit(*args)
                seen.append(generation.sampler.params)
                return generation

            monkeypatch.setattr(engine, "submit", spy)
            reply = await http.post("/v1/completions", json={"model": MODEL, "prompt": "ab"} | SENT)
            assert reply.status_code == 200, reply.text
        (params,) = seen
        found = dataclasses.asdict(params)
        assert all(found[f.name] != f.default for f in dataclasses.fields(SamplingParams))
        expected = SENT | {"stop": ("never this",), "stop_token_ids": (7,), "logit_bias": {4: 1.5}}
        del expected["echo"]
        assert found == expected | {"prompt_logprobs": 2}

    run(test())
