"""From a request to an answer in progress."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from models.sink_lm.engine.engine import Engine
from models.sink_lm.engine.generation import Generation, PromptEvent
from models.sink_lm.engine.sampling_params import SamplingParams
from serve.lm.contract import TAIL, Feed, SessionState, Start, Started, Token
from serve.lm.replica.active_generations import Desk
from serve.lm.replica.engine_thread import EngineThread
from serve.lm.replica.generations import Replay, RunningAnswer, Source, prompt_token
from serve.lm.replica.refusals import (
    NO_RETRY,
    NoSlab,
    Refusal,
    cannot_follow,
    check_resume,
    log_failed,
    nobody_waits,
    replaced,
    session_busy,
)
from serve.lm.replica.resident_session import Held, io
from serve.lm.replica.session_table import SessionTable
from serve.lm.replica.slab_queue import SlabQueue
from serve.lm.replica.text import AnswerText
from serve.lm.store.session_store import Turn

RESUME_CONTEXT = 512
"""Tokens before a resumed position that are decoded again: a stop string's length and more."""


class Starter:
    """Starts answers and hands them in at the desk.

    Args:
        engine: generates.
        thread: runs it.
        sessions: those it generates in.
        desk: takes the answers.
        tokenizer: the model's.
        queue: where requests wait for a slab.
        capacity: tokens a session sees.
    """

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread,
        sessions: SessionTable,
        desk: Desk,
        tokenizer: Tokenizer,
        *,
        queue: SlabQueue,
        capacity: int,
    ) -> None:
        self._queue = queue
        self._engine, self._thread = engine, thread
        self._sessions, self._desk = sessions, desk
        self._tokenizer, self._capacity = tokenizer, capacity

    async def start(self, start: Start) -> Started:
        """Feeds a prompt and begins to answer it; see `Start`."""
        async with self._desk.locks.get(start.request_id):
            await self._desk.end(start.request_id)  # what a call made that is repeated now
            with self._desk.expect(start.request_id) as gone:
                if start.session_id is None:
                    return await self._start_temporary(start, gone)
                return await self._start_kept(start.session_id, start, gone)

    async def _start_kept(self, session_id: str, start: Start, gone: asyncio.Event) -> Started:
        async def attempt() -> Started:
            async with self._sessions.locked(session_id):
                held = await self._sessions.take(session_id, create=bool(start.feeds))
                return await self._start_session(held, start)

        if self._sessions.get(session_id) is not None:  # it has a slab and need not wait for one
            with contextlib.suppress(NoSlab):  # it had
                return await attempt()
        return await self._queue.run(attempt, 1, gone)

    async def _start_temporary(self, start: Start, gone: asyncio.Event) -> Started:
        """A stream of its own for every answer; answers to one prompt share its prefill."""
        names = [_temporary_name() for _ in range(len(start.feeds) * start.n)]
        await self._queue.run(partial(self._open, names), len(names), gone)
        try:
            sources = []
            for number, feed in enumerate(start.feeds):
                own = names[number * start.n : (number + 1) * start.n]
                sources += await self._sources(feed, own, start.params, gone)
        except BaseException:
            await self._sessions.close_temporary(names)
            raise
        self._desk.put(start.request_id, RunningAnswer(sources, kept=None))
        return Started(
            prompt_tokens=sum(len(feed.start) for feed in start.feeds),
            cached_tokens=0,
            session=None,
            position=len(start.feeds[0].start),
        )

    async def _open(self, names: Sequence[str]) -> None:
        """Takes all the slabs or none: who held some and waited for more could wait for ever."""
        opened: list[str] = []
        try:
            for name in names:
                await self._sessions.open_temporary(name)
                opened.append(name)
        except BaseException:
            await self._sessions.close_temporary(opened)
            raise

    async def _sources(
        self, feed: Feed, names: Sequence[str], params: SamplingParams, gone: asyncio.Event
    ) -> list[Source]:
        """The answers to one prompt, each in a stream of its own."""
        if len(names) == 1:
            return [Source(names[0], await self._submit(names[0], feed.start, params))]
        prompt = await self._read(names[0], feed.start, params, gone)
        state = await self._thread.call(partial(self._engine.export, names[0]))
        await self._sessions.refill_temporary(names[1:], state)
        rest, sources = replace(params, prompt_logprobs=None), []
        for number, name in enumerate(names):
            generation = await self._submit(name, (), _seeded(rest, number))
            sources.append(Source(name, generation, prompt=prompt))
        return sources

    async def _read(
        self, name: str, prompt: Sequence[int], params: SamplingParams, gone: asyncio.Event
    ) -> list[Token]:
        """Has a stream read a prompt but for its last token; returns what is told of its tokens."""
        only = SamplingParams(max_tokens=0, prompt_logprobs=params.prompt_logprobs)
        reading, tokens = await self._submit(name, prompt, only), []
        while not reading.done:
            if gone.is_set():
                raise nobody_waits()
            events = reading.take(max_events=1024)
            tokens += [prompt_token(event) for event in events if isinstance(event, PromptEvent)]
            await asyncio.sleep(0.005)
        return tokens

    async def _start_session(self, held: Held, start: Start) -> Started:
        repeated = held.turn.request_id == start.request_id
        if start.goes_on and not repeated:
            raise replaced(held.session_id)
        if held.answer is not None:
            # Whoever resumes is the reader whose stream broke: the old answer has none.
            if start.resume_at is None and not repeated:
                raise session_busy(held.session_id)
            await self._desk.end(held.answer)
        if start.resume_at is not None:
            check_resume(start.resume_at, held.log.position, held.turn.answer_from)
            if not repeated:
                await self._turn(held, replace(held.turn, request_id=start.request_id))
            return await self._resume(held, start, start.resume_at)
        if repeated and held.log.position >= held.turn.answer_from:
            return await self._resume(held, start, held.turn.answer_from)
        return await self._feed(held, start, repeated=repeated)

    async def _feed(self, held: Held, start: Start, *, repeated: bool) -> Started:
        tokens = await self._begin_turn(held, start, repeated=repeated)
        state = held.state(self._capacity, extra=len(tokens))
        before = (*held.tail, *tokens)[-TAIL:]  # may end inside a character
        text = AnswerText(self._tokenizer, start.params, before, answered=0)
        generation = await self._submit(held.session_id, tokens, start.params)
        if held.failure is not None:
            generation.cancel()
            raise log_failed(held.failure)
        source = Source(held.session_id, generation, held=held, text=text)
        return self._started(held, start, source, len(tokens), state)

    async def _begin_turn(self, held: Held, start: Start, *, repeated: bool) -> tuple[int, ...]:
        """The tokens to feed, once the store knows where they and their answer will lie."""
        position = held.log.position
        if repeated:  # the replica died inside the prompt: the rest of it is missing
            before = held.turn.prompt_from
            tail = tuple(await io(partial(held.log.read, max(0, before - TAIL), before)))
            return start.feeds[0].after(before, tail)[position - before :]
        if position and start.feeds and start.feeds[0].problem:
            raise cannot_follow(start.feeds[0].problem)
        tokens = start.feeds[0].after(position, tuple(held.tail)) if start.feeds else ()
        if position == 0 and not tokens:
            raise Refusal(400, "empty_input", "an empty session needs a prompt", param="prompt")
        turn = Turn(
            request_id=start.request_id,
            prompt_from=position,
            answer_from=position + len(tokens),
        )
        await self._turn(held, turn)
        return tokens

    async def _turn(self, held: Held, turn: Turn) -> None:
        if held.stored is not None:
            await io(partial(held.stored.begin_turn, turn))
        held.turn = turn

    async def _resume(self, held: Held, start: Start, position: int) -> Started:
        """Shows again what the log has after `position`, then goes on from its end."""
        params, stop = start.params, held.log.position
        before = await self._before(held, position)
        answered = min(len(before), position - held.turn.answer_from)
        text = AnswerText(self._tokenizer, params, before, answered=answered)

        async def begin(shown: int) -> Generation:
            return await self._submit(held.session_id, (), params.after(shown))

        over = text.over if position == stop else None
        replay = Replay(log=held.log, position=position, stop=stop, begin=begin)
        source = Source(
            held.session_id, held=held, text=text, replay=None if over else replay, end=over
        )
        state = replace(held.state(self._capacity), stream_position=position)
        return self._started(held, start, source, 0, state)

    async def _before(self, held: Held, position: int) -> list[int]:
        """Tokens of the stream before `position`, as far as their text matters."""
        if not held.log.position:
            raise Refusal(400, "empty_input", "an empty session needs a prompt", param="prompt")
        if held.stored is not None:
            first = max(0, position - RESUME_CONTEXT)
            return await io(partial(held.log.read, first, position))
        if position < held.log.position:
            message = "this server keeps no log of its sessions: resume at its end"
            raise Refusal(409, "no_log", message, headers=NO_RETRY)
        return list(held.tail)

    def _started(
        self, held: Held, start: Start, source: Source, prompt_tokens: int, state: SessionState
    ) -> Started:
        self._desk.put(start.request_id, RunningAnswer([source], kept=held.session_id), held)
        return Started(
            prompt_tokens=prompt_tokens,
            cached_tokens=min(state.stream_position - prompt_tokens, self._capacity - 1),
            session=state,
            position=state.stream_position,
        )

    async def _submit(
        self, session_id: str, tokens: Sequence[int], params: SamplingParams
    ) -> Generation:
        return await self._thread.call(
            lambda: self._engine.submit(session_id, list(tokens), params)
        )


def _seeded(params: SamplingParams, number: int) -> SamplingParams:
    """Answers to one prompt differ though they have one seed."""
    if params.seed is None or number == 0:
        return params
    return replace(params, seed=params.seed + number)


def _temporary_name() -> str:
    return f"temporary-{uuid.uuid4().hex}"
