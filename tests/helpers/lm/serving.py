"""A tiny language model and its server, with and without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import torch
import transformers
from ray.exceptions import ActorDiedError
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from helpers.waiting import LIMIT_S
from models.sink_lm.checkpoints.tokenizer import load_tokenizer
from models.sink_lm.engine.sampling_params import SamplingParams
from serve.ingress.application import IngressParts
from serve.ingress.errors import ApiError
from serve.lm.contract import Feed, Start
from serve.lm.frontend.client import LMClient
from serve.lm.frontend.routes import create_lm_app
from serve.lm.frontend.served_models import ServedModels
from serve.lm.frontend.service import LanguageService
from serve.lm.replica.language_model import LanguageModel
from serve.lm.settings import LMSettings

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL = "tiny"
BYTES = pre_tokenizers.ByteLevel.alphabet()


def save_tiny_lm(folder: Path, *, seed: int = 3, more: Sequence[str] = ()) -> None:
    """A random Llama of bytes, whose greedy text wanders.

    Args:
        folder: takes the files.
        seed: of the weights.
        more: further special tokens, which shift the ids of all bytes.
    """
    special = [*SPECIAL, *more]
    bpe = tokenizers.Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special),
        special_tokens=special,
        initial_alphabet=sorted(BYTES),
        show_progress=False,
    )
    bpe.train_from_iterator([""], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256 + len(special),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def events(lines: Iterator[str]) -> Iterator[tuple[int | None, Any]]:
    """Returns (id, data) of each event; "[DONE]" is not parsed."""
    position = None
    for line in lines:
        if line.startswith("id: "):
            position = int(line[4:])
        elif line.startswith("data: "):
            data = line[6:]
            yield position, data if data == "[DONE]" else json.loads(data)
            position = None


def same_text(kept: str, whole: str) -> bool:
    """Whether a session's text equals that of an answer without a session.

    Only the latter shows an incomplete character at its end, as U+FFFD.
    """
    return whole in (kept, kept + "\ufffd")


class Remote:
    """`handle.method.remote(...)`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Cluster:
    """Replicas in this process, called through a handle like Serve's.

    Args:
        settings: settings of every replica.
    """

    def __init__(self, settings: LMSettings) -> None:
        self.settings = settings
        self.replicas = [LanguageModel(settings, self)]
        self.route: Callable[[str], int] = lambda session_id: -1
        self.cancels = True
        """Whether cancelling a call cancels the replica's method, as Serve does for a client that
        disconnects but not for a caller that gives up."""
        self.dies_after: set[str] = set()
        """Methods whose next call is carried out, but whose reply is lost."""
        self.describe = Remote(lambda: self.replicas[-1].describe())
        self.report = self.scrape = Remote(lambda *_: asyncio.sleep(0, ""))

    @property
    def replica(self) -> LanguageModel:
        return self.replicas[-1]

    def add(self) -> LanguageModel:
        """One more replica, which gets all calls from now on."""
        self.replicas.append(LanguageModel(self.settings, self))
        return self.replica

    def options(self, *, session_id: str, method_name: str) -> Remote:
        async def call(*args: Any, **kwargs: Any) -> Any:
            replica = self.replicas[self.route(session_id)]
            method = getattr(replica, method_name)(*args, **kwargs)
            result = await (method if self.cancels else asyncio.shield(method))
            if method_name in self.dies_after:
                self.dies_after.discard(method_name)
                raise ActorDiedError
            return result

        return Remote(call)

    def client(self) -> LMClient:
        return LMClient(self, persistent=self.settings.store is not None)

    async def close(self) -> None:
        for replica in self.replicas:
            replica._reporter._task.cancel()
            replica._maintenance._task.cancel()
            replica._thread.stop()


@contextlib.asynccontextmanager
async def cluster(folder: Path, **settings: Any) -> AsyncIterator[Cluster]:
    """Yields one replica, without Ray."""
    defaults = {"sessions": 2, "cache": 32, "max_choices": 2, "threads": 1, "prefill_chunk": 16}
    # What a test waits for shall not come about by these.
    defaults |= {"reader_timeout_s": 2 * LIMIT_S, "queue_timeout_s": 2 * LIMIT_S}
    made = Cluster(LMSettings(model=str(folder), name=MODEL, **(defaults | settings)))
    try:
        yield made
    finally:
        await made.close()


@contextlib.asynccontextmanager
async def web(made: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """Yields a client of the ingress in front of the replica, without Ray."""
    card = await made.replica.describe()

    async def is_ready() -> bool:
        return True

    async def scrape() -> str:
        return ""

    parts = IngressParts(settings=made.settings, scrape=scrape, is_ready=is_ready)
    service = LanguageService(made.settings, card, load_tokenizer(made.settings.model))
    client = made.client()
    app = create_lm_app(parts, ServedModels(made.settings, client, service), client)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://lm", timeout=30) as client:
        yield client


def ask(request_id: str, session_id: str | None, prompt: str = "", **more: Any) -> Start:
    """Returns a greedy request; without a prompt it goes on with the session."""
    ids = tuple(load_ids(prompt))
    names = ("n", "resume_at", "goes_on", "release")
    fields = {name: more.pop(name) for name in names if name in more}
    options = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True} | more
    feeds = (Feed(start=ids, follow=ids),) if ids else ()
    return Start(
        request_id=request_id,
        session_id=session_id,
        feeds=feeds,
        params=SamplingParams(**options),
        **fields,
    )


def load_ids(text: str) -> list[int]:
    """Returns token ids of the tiny model: one per byte, in the order of the byte alphabet."""
    order = {char: len(SPECIAL) + i for i, char in enumerate(sorted(BYTES))}
    (pieces,) = [pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]
    return [order[char] for piece, _ in pieces for char in piece]


async def read(replica: LanguageModel, request_id: str) -> tuple[list[int], str]:
    """Returns all tokens of an answer and its finish reason."""
    tokens: list[int] = []
    while True:
        taken = await replica.take(request_id, 64, 1.0)
        for piece in taken.pieces:  # type: ignore[union-attr]
            tokens += [token.token for token in piece.tokens]
            if piece.end is not None:
                return tokens, piece.end.reason


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


async def say(replica: LanguageModel, session_id: str, prompt: str, **more: Any) -> list[int]:
    """Runs a whole turn and returns the answer's tokens."""
    start = ask(uuid.uuid4().hex, session_id, prompt, **more)
    started = await replica.start(start)
    assert not isinstance(started, ApiError), started
    tokens, reason = await read(replica, start.request_id)
    assert reason == "length"
    return tokens


def slabs(replica: LanguageModel) -> set[str]:
    return set(replica._engine.sessions())


def slow(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
    real = getattr(owner, name)

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, slowed)
