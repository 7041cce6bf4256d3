"""The language model's replica: one engine, one thread that runs it, and its sessions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge

from models.sink_lm.engine import Engine
from models.sink_lm.generation import Generation
from models.sink_lm.llama import Llama
from models.sink_lm.tokenizer import load_tokenizer
from models.sink_lm.weights import load_model
from serve.lm_answers import AnswerText, RunningAnswer, Source
from serve.lm_contract import (
    TAIL,
    End,
    Feed,
    LMCard,
    Options,
    Piece,
    Refused,
    SessionState,
    Start,
    Started,
    Taken,
)
from serve.lm_engine_thread import EngineThread
from serve.lm_model import fingerprint, generation_request
from serve.lm_refusals import NO_RETRY, Refusal, check_resume, session_busy
from serve.lm_sessions import Held, SessionTable, io
from serve.lm_settings import LMSettings
from serve.session_store import SessionStore, Turn
from serve.telemetry import Reporter

KEEP_HOUSE_S = 1.0
RESUME_CONTEXT = 512
"""Tokens before a resumed position that are decoded again: a stop string's length and more."""
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
Args = ParamSpec("Args")
Result = TypeVar("Result")


def _refusing(
    method: Callable[Concatenate[LanguageModel, Args], Awaitable[Result]],
) -> Callable[Concatenate[LanguageModel, Args], Awaitable[Result | Refused]]:
    """Returns a refusal instead of raising it: see `serve.lm_contract`."""

    @wraps(method)
    async def called(
        self: LanguageModel, /, *args: Args.args, **kwargs: Args.kwargs
    ) -> Result | Refused:
        try:
            return await method(self, *args, **kwargs)
        except Refusal as refusal:
            return refusal.refused

    return called


class LanguageModel:
    """Serve deployment around an `Engine`.

    Args:
        settings: see `LMSettings`.
        telemetry: handle of the `Telemetry` deployment.
    """

    def __init__(self, settings: LMSettings, telemetry: Any) -> None:
        self._settings = settings
        device = "cuda" if settings.gpus else "cpu"
        model = load_model(settings.model, dtype=_DTYPES[settings.dtype], device=device)
        self._tokenizer = load_tokenizer(settings.model)
        self._engine = Engine(
            model,
            self._tokenizer,
            sessions=settings.sessions,
            capacity=settings.cache,
            prefill_chunk=settings.prefill_chunk,
            max_buffered=settings.max_buffered,
            journal=self._journal,
        )
        self._card = self._make_card(model)
        store = None
        if settings.store is not None:
            store = SessionStore(settings.store, self._card.fingerprint)
        self._thread = EngineThread(self._engine, settings.threads)
        self._sessions = SessionTable(
            self._engine,
            self._thread,
            store,
            sinks=settings.sinks,
            ttl_s=settings.session_ttl_s,
            capacity=settings.cache,
        )
        self._answers: dict[str, RunningAnswer] = {}
        self._metrics(telemetry)
        self._housekeeper = asyncio.get_running_loop().create_task(self._keep_house())

    async def describe(self) -> LMCard:
        """What is served here."""
        return self._card

    def check_health(self) -> None:
        """Called by Serve every few seconds; raises RuntimeError when the engine is dead."""
        self._thread.check()

    @_refusing
    async def start(self, start: Start) -> Started:
        """Feeds a prompt and begins to answer it; see `Start`."""
        if start.session_id is None:
            return await self._start_temporary(start)
        async with self._sessions.lock(start.session_id):
            held = await self._sessions.take(start.session_id, create=bool(start.feeds))
            return await self._start_session(held, start)

    async def take(self, answer: str, max_tokens: int, wait_s: float) -> Taken:
        """What an answer has made since the last call, after waiting for it up to `wait_s`."""
        running = self._answers.get(answer)
        if running is None:
            return Taken(pieces=(Piece(index=0, tokens=(), end=End(reason="lost")),))
        pieces = await running.take(max_tokens, wait_s)
        self._generated.inc(sum(len(piece.tokens) for piece in pieces))
        held = self._sessions.get(running.kept) if running.kept is not None else None
        if running.ended:
            await self._finish(answer)
        state = await self._sessions.state(held) if held is not None else None
        return Taken(pieces=pieces, session=state)

    async def cancel(self, answer: str) -> None:
        """Ends an answer at a token boundary; its session stays."""
        running = self._answers.get(answer)
        if running is None:
            return
        running.cancel()
        while not running.stopped:
            await asyncio.sleep(0.005)
        await self._finish(answer)

    @_refusing
    async def create(
        self, session_id: str, sinks: int | None, pinned: Sequence[int], ttl_s: float | None
    ) -> SessionState:
        """Makes a session."""
        async with self._sessions.lock(session_id):
            held = await self._sessions.create(session_id, sinks=sinks, pinned=pinned, ttl_s=ttl_s)
            return await self._sessions.state(held)

    @_refusing
    async def describe_session(self, session_id: str) -> SessionState:
        """A session seen from outside."""
        return await self._sessions.describe(session_id)

    async def list_sessions(self) -> list[SessionState]:
        """All sessions: those held here and those stored."""
        found = []
        for name in await self._sessions.names():
            try:
                found.append(await self._sessions.describe(name))
            except Refusal:
                continue  # expired or deleted meanwhile
        return found

    @_refusing
    async def delete(self, session_id: str) -> None:
        """Removes a session and ends what it generates."""
        async with self._sessions.lock(session_id):
            await self._sessions.describe(session_id)
            held = self._sessions.get(session_id)
            if held is not None and held.answer is not None:
                await self.cancel(held.answer)
            await self._sessions.delete(session_id)

    @_refusing
    async def fork(self, session_id: str, new_id: str) -> SessionState:
        """Makes a second session with the same stream so far."""
        async with self._sessions.lock(session_id):
            return await self._sessions.fork(await self._idle(session_id), new_id)

    @_refusing
    async def snapshot(self, session_id: str) -> SessionState:
        """Stores a session's keys and values now."""
        async with self._sessions.lock(session_id):
            held = await self._sessions.take(session_id, create=False)
            await self._sessions.snapshot(held)
            return await self._sessions.state(held)

    @_refusing
    async def restore(self, session_id: str) -> SessionState:
        """Drops a session's keys and values and loads them from the store again."""
        async with self._sessions.lock(session_id):
            held = await self._idle(session_id)
            if held.stored is None:
                raise Refusal(409, "no_store", "this server stores no sessions", headers=NO_RETRY)
            await self._sessions.drop(held)
            return await self._sessions.state(await self._sessions.take(session_id, create=False))

    def _journal(self, session_id: str, tokens: Sequence[int]) -> None:
        self._sessions.journal(session_id, tokens)

    async def _idle(self, session_id: str) -> Held:
        held = await self._sessions.take(session_id, create=False)
        if held.answer is not None:
            raise session_busy(session_id)
        return held

    async def _start_temporary(self, start: Start) -> Started:
        """A stream of its own for every answer; answers to one prompt share its prefill."""
        opened: list[str] = []
        sources = []
        try:
            for feed in start.feeds:
                for number, name in enumerate(await self._open_temporary(feed, start.n, opened)):
                    rest = () if start.n > 1 else feed.start
                    options = _seeded(start.options, number)
                    sources.append(Source(name, await self._submit(name, rest, options)))
        except BaseException:
            for name in opened:
                await self._sessions.close_temporary(name)
            raise
        return Started(
            answer=self._register(RunningAnswer(sources, kept=None)),
            prompt_tokens=sum(len(feed.start) for feed in start.feeds),
            cached_tokens=0,
            session=None,
            position=len(start.feeds[0].start),
        )

    async def _open_temporary(self, feed: Feed, answers: int, opened: list[str]) -> list[str]:
        """Takes slabs; for several answers with all of the prompt but its last token read."""
        names = [_temporary_name() for _ in range(answers)]
        await self._sessions.open_temporary(names[0])
        opened.append(names[0])
        if answers == 1:
            return names
        state = await self._prefilled(names[0], feed.start)
        opened.remove(names[0])
        await self._sessions.close_temporary(names[0])
        for name in names:
            await self._sessions.restore_temporary(name, state)
            opened.append(name)
        return names

    async def _prefilled(self, name: str, prompt: Sequence[int]) -> dict[str, torch.Tensor]:
        """The state of a stream that has read a prompt but for its last token."""
        if len(prompt) > 1:
            # One token sampled after the rest of the prompt, and thrown away: it was not read yet.
            throwaway = await self._submit(name, prompt[:-1], Options(max_tokens=1))
            while not throwaway.ended:
                await asyncio.sleep(0.005)
        state = await self._thread.call(partial(self._engine.export, name))
        return state | {"pending": torch.tensor(prompt[-1:])}

    async def _start_session(self, held: Held, start: Start) -> Started:
        repeated = held.turn.request_id == start.request_id
        if held.answer is not None:
            # Whoever resumes is the reader whose stream broke: the old answer has none.
            if start.resume_at is None and not repeated:
                raise session_busy(held.session_id)
            await self.cancel(held.answer)
        if repeated and held.log.position >= held.turn.answer_from:
            return await self._resume(held, start, held.turn.answer_from)
        if start.resume_at is not None:
            check_resume(start.resume_at, held.log.position, held.turn.answer_from)
            return await self._resume(held, start, start.resume_at)
        tokens = await self._begin_turn(held, start, repeated=repeated)
        state = await self._sessions.state(held, extra=len(tokens))
        before = (*held.tail, *tokens)[-TAIL:]  # may end inside a character
        text = AnswerText(self._tokenizer, start.options, before, answering=False)
        generation = await self._submit(held.session_id, tokens, start.options)
        if held.failure is not None:
            message = f"the session's log cannot be written: {held.failure}"
            raise Refusal(503, "log_failed", message, headers={"Retry-After": "1"})
        source = Source(held.session_id, generation, held, text)
        return self._started(held, source, len(tokens), state)

    async def _begin_turn(self, held: Held, start: Start, *, repeated: bool) -> tuple[int, ...]:
        """The tokens to feed, once the store knows where they and their answer will lie."""
        position = held.log.position
        if repeated:  # the replica died inside the prompt: the rest of it is missing
            before = held.turn.prompt_from
            tail = tuple(held.log.read(max(0, before - TAIL), before))
            return start.feeds[0].after(before, tail)[position - before :]
        tokens = start.feeds[0].after(position, tuple(held.tail)) if start.feeds else ()
        if position == 0 and not tokens:
            raise Refusal(400, "empty_input", "an empty session needs a prompt", param="prompt")
        held.turn = Turn(
            request_id=start.request_id,
            prompt_from=position,
            answer_from=position + len(tokens),
        )
        if held.stored is not None:
            await io(partial(held.stored.begin_turn, held.turn))
        return tokens

    async def _resume(self, held: Held, start: Start, position: int) -> Started:
        """Shows again what the log has after `position`, then goes on from its end."""
        options = start.options
        before, ids = await self._logged(held, position)
        text = AnswerText(self._tokenizer, options, before, answering=True)
        replay, end = text.replay(ids, position)
        generation = None
        if end is None:
            limit, done = options.max_tokens, len(replay)
            rest = replace(
                options,
                max_tokens=None if limit is None else limit - done,
                min_tokens=max(0, options.min_tokens - done),
            )
            generation = await self._submit(held.session_id, (), rest)
        source = Source(held.session_id, generation, held, text, replay, end)
        state = replace(await self._sessions.state(held), stream_position=position)
        return self._started(held, source, 0, state)

    async def _logged(self, held: Held, position: int) -> tuple[list[int], list[int]]:
        """Tokens of the answer before `position`, as far as its text matters, and those after."""
        first = max(held.turn.answer_from, position - RESUME_CONTEXT)
        if held.stored is None and position == held.log.position:
            return list(held.tail)[first - position :] if first < position else [], []
        try:
            ids = await io(partial(held.log.read, first))
        except LookupError as error:
            raise Refusal(409, "no_log", str(error), headers=NO_RETRY) from error
        return ids[: position - first], ids[position - first :]

    def _started(
        self, held: Held, source: Source, prompt_tokens: int, state: SessionState
    ) -> Started:
        running = RunningAnswer([source], kept=held.session_id)
        held.answer = self._register(running)
        held.log.when_durable(running.tell)
        return Started(
            answer=held.answer,
            prompt_tokens=prompt_tokens,
            cached_tokens=min(state.stream_position - prompt_tokens, self._settings.cache - 1),
            session=state,
            position=state.stream_position,
        )

    async def _submit(self, session_id: str, tokens: Sequence[int], options: Options) -> Generation:
        request = generation_request(options)
        return await self._thread.call(
            lambda: self._engine.submit(session_id, list(tokens), request)
        )

    def _register(self, running: RunningAnswer) -> str:
        name = uuid.uuid4().hex
        self._answers[name] = running
        return name

    async def _finish(self, answer: str) -> None:
        """Forgets an answer; temporary streams end with it."""
        running = self._answers.pop(answer, None)
        if running is None:
            return
        held = self._sessions.get(running.kept) if running.kept is not None else None
        if held is not None and held.answer == answer:
            held.answer, held.last_used = None, time.monotonic()
            held.log.when_durable(None)
        if running.kept is None:
            for source in running.sources:
                await self._sessions.close_temporary(source.session_id)

    async def _keep_house(self) -> None:
        """Snapshots what has grown, ends what nobody reads, deletes what is over."""
        while True:
            await asyncio.sleep(KEEP_HOUSE_S)
            now = time.monotonic()
            for name, running in list(self._answers.items()):
                unread = now - running.last_read > self._settings.reader_timeout_s
                if unread and not running.readers:
                    await self.cancel(name)
            for held in self._sessions.held():
                if held.failure is not None and held.answer is not None:
                    self._answers[held.answer].cancel()
                grown = held.log.position - held.snapshot_at >= self._settings.snapshot_every
                lock = self._sessions.lock(held.session_id)
                if grown and held.stored is not None and not lock.locked():
                    async with lock:
                        await self._sessions.snapshot(held)
            await self._sessions.expire()

    def _make_card(self, model: Llama) -> LMCard:
        settings = self._settings
        return LMCard(
            name=settings.name or "model",
            created=int(time.time()),
            vocab_size=model.cfg.vocab_size,
            capacity=settings.cache,
            sinks=settings.sinks,
            sessions=settings.sessions,
            bytes_per_session=self._engine.slabs.bytes_per_session,
            fingerprint=fingerprint(model, settings.cache),
            persistent=settings.store is not None,
        )

    def _metrics(self, telemetry: Any) -> None:
        registry = CollectorRegistry()
        self._generated = Counter(
            "rayjepa_generated_tokens", "Tokens generated and taken", registry=registry
        )
        answers = Gauge("rayjepa_answers", "Answers in progress", registry=registry)
        answers.set_function(lambda: len(self._answers))
        held = Gauge("rayjepa_sessions_in_memory", "Sessions with a slab", registry=registry)
        held.set_function(lambda: len(self._sessions.held()))
        self._reporter = Reporter(registry, telemetry)


def _seeded(options: Options, number: int) -> Options:
    """Answers to one prompt differ though they have one seed."""
    if options.seed is None or number == 0:
        return options
    return replace(options, seed=options.seed + number)


def _temporary_name() -> str:
    return f"temporary-{uuid.uuid4().hex}"
