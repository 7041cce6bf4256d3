"""Log probabilities in replies: all tokens, under different names, without stop strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.lm.serving import MODEL, cluster, events, run, web
from models.sink_lm.engine.output import End, Token
from serve.lm.frontend.reply_bodies import CompletionShape, ShownTokens

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}


async def complete(http: httpx.AsyncClient, **body: Any) -> Any:
    reply = await http.post("/v1/completions", json=GREEDY | body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


async def streamed(http: httpx.AsyncClient, route: str, **body: Any) -> tuple[str, list[Any]]:
    """Text and token entries of a stream."""
    reply = await http.post(f"/v1/{route}", json=GREEDY | {"stream": True} | body)
    text, tokens = "", []
    for _, chunk in list(events(iter(reply.text.splitlines())))[:-1]:
        (entry,) = chunk["choices"]
        logprobs = entry["logprobs"] or {}
        if route == "completions":
            text += entry["text"]
            tokens += logprobs.get("tokens", [])
        else:
            text += entry["delta"].get("content") or ""
            tokens += [each["token"] for each in logprobs.get("content", [])]
    return text, tokens


@pytest.mark.parametrize("temperature", [0, 2])
def test_likely_tokens_that_are_no_text_are_kept(temperature: float, tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            sampled = {"temperature": temperature, "seed": 3, "prompt": "😀😀", "max_tokens": 12}
            names: set[str] = set()
            for count in (20, 1, 0):
                found = (await complete(http, **sampled, logprobs=count))["logprobs"]
                for token, logprob, top in zip(
                    found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
                ):
                    assert top[token] == logprob
                    inside = logprob in sorted(top.values())[-count:] and len(top) == count
                    assert len(top) == count + (not inside)
                    assert list(top.values())[:count] == sorted(top.values(), reverse=True)[:count]
                    names |= top.keys()
            assert any(name.startswith("bytes:\\x") for name in names)
            assert "\ufffd" not in names

    run(test())


def test_tokens_of_the_same_text_keep_names_of_their_own() -> None:
    """SentencePiece has a byte token and a letter token; padding tokens are empty."""
    texts = {1: b"A", 2: b"A", 3: b"", 4: b"", 5: b"\xf0", 6: b"\xf0"}
    shape = CompletionShape("m", "f", texts.__getitem__, logprobs=True)
    top = tuple((token, -float(token)) for token in texts)
    entry = shape._some_logprobs(0, [Token(1, 6, "", -6.0, top)])
    assert entry["top_logprobs"][0] == {
        "A": -1.0,
        "bytes:\\x41": -2.0,
        "": -3.0,
        "bytes:": -4.0,
        "bytes:\\xf0": -5.0,
        "token_id:6": -6.0,
    }


def test_a_cut_stop_string_has_no_tokens(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            body: dict[str, Any] = {"prompt": "stop here", "max_tokens": 40, "logprobs": 1}
            whole = await complete(http, **body)
            text, tokens = whole["text"], whole["logprobs"]["tokens"]
            assert len(tokens) == 40
            stop = text[11:15]
            shown = text[: text.index(stop)]
            cut = await complete(http, **body, stop=["never that", stop])
            assert cut["text"] == shown
            count = len(cut["logprobs"]["tokens"])
            offsets = whole["logprobs"]["text_offset"]
            # All whose first character is shown, and no more.
            assert count == sum(offset < len(shown) for offset in offsets)
            assert cut["logprobs"]["tokens"] == tokens[:count]
            assert cut["logprobs"]["text_offset"] == offsets[:count]
            assert await streamed(http, "completions", **body, stop=stop) == (
                shown,
                tokens[:count],
            )
            # A stop string that only seemed to begin costs nothing.
            almost = await complete(http, **body, stop=text[11:15] + "never")
            assert almost == whole

    run(test())


def test_chats_cut_them_too_and_streams_have_every_other_token(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            asked: dict[str, Any] = {
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 30,
                "logprobs": True,
            }
            reply = (await http.post("/v1/chat/completions", json=GREEDY | asked)).json()
            (choice,) = reply["choices"]
            text = choice["message"]["content"]
            tokens = [each["token"] for each in choice["logprobs"]["content"]]
            assert len(tokens) == 30
            assert await streamed(http, "chat/completions", **asked) == (text, tokens)
            stop = text[8:11]
            cut, some = await streamed(http, "chat/completions", **asked, stop=stop)
            assert cut == text[: text.index(stop)]
            assert 0 < len(some) < 30
            assert some == tokens[: len(some)]

    run(test())


def test_a_session_s_tokens_are_cut_alike_after_a_resume(tiny_lm: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made, web(made) as http:
            body: dict[str, Any] = {"max_tokens": 40, "logprobs": 1}
            whole = await complete(http, prompt="stop here", **body)
            text, offsets = whole["text"], whole["logprobs"]["text_offset"]
            stop = text[11:15]
            shown = text[: text.index(stop)]
            count = sum(offset < len(shown) for offset in offsets)
            kept = {"session_id": "s", "stop": stop}
            cut = await complete(http, prompt="stop here", **body, **kept)
            assert (cut["text"], len(cut["logprobs"]["tokens"])) == (shown, count)
            at = len("stop here") + 5
            rest = await complete(http, **body, **kept, resume_at=at)
            assert rest["text"] == shown[offsets[5] :]
            assert rest["logprobs"]["tokens"] == cut["logprobs"]["tokens"][5:]
            # They were replayed: what they were drawn from is not kept.
            assert rest["logprobs"]["token_logprobs"] == [None] * (count - 5)

    run(test())


def test_tokens_wait_for_their_text() -> None:
    shown = ShownTokens()
    half, whole = Token(1, 7, "", offset=0), Token(2, 8, "é", offset=0)
    held, stop = Token(3, 9, "", offset=1), End(reason="stop", stop="EN")
    assert shown.push([half], None) == []
    assert shown.push([whole], None) == [half, whole]
    assert shown.push([held], None) == []
    assert shown.push([], stop) == []
    other = ShownTokens()
    other.push([half, whole, held], None)
    assert other.push([], End(reason="length", text="E")) == [held]
