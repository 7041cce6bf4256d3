"""`echo` with log probabilities, compared with transformers on the same weights."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from helpers.lm.serving import MODEL, SPECIAL, Cluster, cluster, events, load_ids, run, web
from models.sink_lm.engine import model_runner

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}
TEXT = "Which number comes after seven? It is eight."


@asynccontextmanager
async def served(folder: Path, **settings: Any) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    """A cache that holds the whole prompt, so that transformers computes the same function."""
    defaults = {"cache": 128, "sessions": 4, "max_choices": 4}
    async with cluster(folder, **(defaults | settings)) as made, web(made) as http:
        yield made, http


async def complete(http: httpx.AsyncClient, **body: Any) -> Any:
    reply = await http.post("/v1/completions", json=GREEDY | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def streamed(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """The choices of a streamed reply, put together."""
    reply = await http.post("/v1/completions", json=GREEDY | {"stream": True} | body)
    assert reply.status_code == 200, reply.text
    made: dict[int, dict[str, Any]] = {}
    *chunks, (_, done) = events(iter(reply.text.splitlines()))
    assert done == "[DONE]"
    for _, chunk in chunks:
        (entry,) = chunk["choices"]
        whole = made.setdefault(entry["index"], {"text": "", "logprobs": {}})
        whole["text"] += entry["text"]
        for name, values in (entry["logprobs"] or {}).items():
            whole["logprobs"].setdefault(name, []).extend(values)
    return [made[index] for index in sorted(made)]


@functools.cache
def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    """Log probabilities of every next token [T, V] by transformers."""
    logits: torch.Tensor = load(folder)(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two choices are alike but for the last bits of a number, which a batch may change."""
    numbers = [pytest.approx(other["logprobs"]["token_logprobs"][1:], abs=1e-5)]
    return (
        one["text"] == other["text"]
        and [one["logprobs"]["token_logprobs"][1:]] == numbers
        and all(one["logprobs"][key] == other["logprobs"][key] for key in ("tokens", "text_offset"))
    )


@pytest.mark.parametrize("prefill_chunk", [5, 256])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_prompt_logprobs_are_those_of_transformers(
    max_tokens: int, prefill_chunk: int, tiny_lm: Path
) -> None:
    async def test() -> None:
        async with served(tiny_lm, prefill_chunk=prefill_chunk) as (_, http):
            body = {"prompt": TEXT, "echo": True, "logprobs": 3, "max_tokens": max_tokens}
            reply = await complete(http, **body)
            (choice,) = reply["choices"]
            found, count = choice["logprobs"], len(TEXT) + max_tokens
            assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
                ("tokens", "token_logprobs", "top_logprobs", "text_offset"), count
            )
            assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
            plain = await complete(http, prompt=TEXT, max_tokens=max(1, max_tokens), logprobs=0)
            made = plain["choices"][0]["logprobs"]["tokens"][:max_tokens]
            assert found["tokens"] == [*TEXT, *made]
            ids = load_ids(TEXT)
            expected_TV = reference(tiny_lm, ids)
            assert len(expected_TV.unique()) > 1000  # not a uniform one
            for place in range(1, len(ids)):
                logprob = found["token_logprobs"][place]
                assert logprob == pytest.approx(float(expected_TV[place - 1, ids[place]]), abs=1e-4)
                likeliest = sorted(found["top_logprobs"][place].values())[-3:]
                theirs = expected_TV[place - 1].topk(3).values.flip(0)
                assert likeliest == pytest.approx(theirs.tolist(), abs=1e-4)
                assert found["top_logprobs"][place][TEXT[place]] == logprob
            assert choice["finish_reason"] == "length"
            assert reply["usage"]["prompt_tokens"] == len(TEXT)
            assert reply["usage"]["completion_tokens"] == max_tokens
            assert await streamed(http, **body) == [
                {"text": choice["text"], "logprobs": choice["logprobs"]}
            ]

    run(test())


QUESTIONS = [
    ("One and one is", [" two", " three", " blue", " a"]),
    ("The colour of grass is", [" green", " seven", " loud", " ok"]),
    ("After Monday comes", [" Tuesday", " cheese", " Sunday", " x"]),
    ("Water is", [" wet", " dry", " a number", " Z"]),
]


def test_a_multiple_choice_task_as_lm_eval_asks_it(tiny_lm: Path) -> None:
    """Token ids, one token generated and thrown away, the choice with the largest sum is taken."""

    async def test() -> None:
        async with served(tiny_lm) as (_, http):
            worst, picked, theirs = 0.0, [], []
            for context, choices in QUESTIONS:
                begin, sums, expected = len(load_ids(context)), [], []
                for choice in choices:
                    ids = load_ids(context + choice)
                    reply = await complete(
                        http, prompt=[ids], max_tokens=1, logprobs=1, echo=True, seed=1234
                    )
                    found = reply["choices"][0]["logprobs"]
                    sums.append(sum(found["token_logprobs"][begin:-1]))
                    rows = reference(tiny_lm, ids)
                    expected.append(sum(float(rows[n - 1, ids[n]]) for n in range(begin, len(ids))))
                    # lm-eval asks whether every token is the likeliest, by its name.
                    for place in range(begin, len(ids)):
                        top = found["top_logprobs"][place]
                        greedy = max(top, key=top.__getitem__) == found["tokens"][place]
                        assert greedy == (int(rows[place - 1].argmax()) == ids[place])
                worst = max(worst, *(abs(a - b) for a, b in zip(sums, expected, strict=True)))
                picked.append(sums.index(max(sums)))
                theirs.append(expected.index(max(expected)))
            assert picked == theirs
            assert worst < 1e-3

    run(test())


def test_every_form_of_a_prompt_comes_back(tiny_lm: Path) -> None:
    async def test() -> None:
        async with served(tiny_lm) as (_, http):
            body: dict[str, Any] = {"max_tokens": 2, "logprobs": 1, "echo": True}
            alone = [
                (await complete(http, prompt=prompt, **body))["choices"][0]
                for prompt in ("ab", "xyz")
            ]
            for prompts in (["ab", "xyz"], [load_ids("ab"), load_ids("xyz")]):
                both = (await complete(http, prompt=prompts, **body))["choices"]
                assert all(map(same, both, alone))
            two = (await complete(http, prompt=["ab", "xyz"], n=2, **body))["choices"]
            assert len(two) == 4
            for several in (two, await streamed(http, prompt=["ab", "xyz"], n=2, **body)):
                assert all(map(same, several, [each for each in alone for _ in range(2)]))
            plain = {"prompt": "ab", "max_tokens": 3, "echo": True}
            (choice,) = (await complete(http, **plain))["choices"]
            assert choice["logprobs"] is None
            assert choice["text"].startswith("ab")
            assert await streamed(http, **plain) == [{"text": choice["text"], "logprobs": {}}]
            nothing = (await complete(http, **plain | {"max_tokens": 0}))["choices"]
            assert nothing[0]["text"] == "ab"
            one = (await complete(http, prompt="a", max_tokens=0, logprobs=1, echo=True))["choices"]
            assert one[0]["logprobs"]["token_logprobs"] == [None]

    run(test())


def test_tokens_begin_where_the_text_says(tiny_lm: Path) -> None:
    """Characters of several tokens, and control tokens, which are no text of a prompt of ids."""

    async def test() -> None:
        async with served(tiny_lm) as (_, http):
            body: dict[str, Any] = {"max_tokens": 0, "logprobs": 1, "echo": True}
            (choice,) = (await complete(http, prompt="a☃b", **body))["choices"]
            assert choice["text"] == "a☃b"
            assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2]
            assert choice["logprobs"]["tokens"] == [
                "a", "bytes:\\xe2", "bytes:\\x98", "bytes:\\x83", "b"]  # fmt: skip
            ids = [SPECIAL.index("<|im_start|>"), *load_ids("ab")]
            (choice,) = (await complete(http, prompt=ids, **body))["choices"]
            assert choice["text"] == "ab"
            assert choice["logprobs"]["tokens"] == ["<|im_start|>", "a", "b"]
            assert choice["logprobs"]["text_offset"] == [0, 0, 1]
            text = "<|im_start|>ab"
            (choice,) = (await complete(http, prompt=text, **body))["choices"]
            assert choice["logprobs"]["tokens"] == list(text)  # users' text controls nothing
            (choice,) = (await complete(http, prompt=text, parse_special=True, **body))["choices"]
            assert choice["text"] == text
            assert choice["logprobs"]["tokens"] == ["<|im_start|>", "a", "b"]
            assert choice["logprobs"]["text_offset"] == [0, 12, 13]
            tokens = await http.post("/v1/tokenize", json={"prompt": text, "parse_special": True})
            assert tokens.json()["tokens"] == ids

    run(test())


def test_what_cannot_be_echoed_is_refused(tiny_lm: Path) -> None:
    async def test() -> None:
        async with served(tiny_lm, max_echo_tokens=5) as (made, http):
            for body, param in (
                ({"prompt": "ab", "echo": True, "session_id": "s"}, "echo"),
                ({"prompt": "ab", "max_tokens": 0}, "max_tokens"),
                ({"prompt": "ab", "echo": "yes"}, "echo"),
                ({"prompt": "abc", "n": 2, "echo": True, "logprobs": 1}, "echo"),
            ):
                reply = await http.post("/v1/completions", json=GREEDY | body)
                assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
            assert not made.replica._engine.sessions()
            await complete(http, prompt="abcdefgh", n=2, echo=True, max_tokens=1)

    run(test())


def test_a_long_prompt_s_logits_are_never_all_there(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do its tokens pile up: a reader who lags behind stops the reading of the prompt."""
    monkeypatch.setattr(model_runner, "SCORED_ROWS", 8)

    async def test() -> None:
        settings = {"prefill_chunk": 20, "max_buffered": 10, "cache": 32}
        async with served(tiny_lm, **settings) as (made, http):
            rows, real, waiting = [], made.replica._engine.model.logits, []

            def logits(x_TE: torch.Tensor) -> torch.Tensor:
                rows.append(len(x_TE))
                for session in made.replica._engine._sessions.values():
                    if session.generation is not None:
                        waiting.append(len(session.generation._events))
                return real(x_TE)

            made.replica._engine.model.logits = logits  # type: ignore[method-assign]
            body = {"prompt": "ab" * 300, "max_tokens": 1, "logprobs": 1, "echo": True}
            (choice,) = (await complete(http, **body))["choices"]
            assert len(choice["logprobs"]["token_logprobs"]) == 601
            assert max(rows) == 8
            assert max(waiting) <= 10 + 20
            assert json.dumps(choice)  # nothing that JSON has not

    run(test())
