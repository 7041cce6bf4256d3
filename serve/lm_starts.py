"""From a request to an answer in progress."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from models.sink_lm.engine import Engine
from models.sink_lm.generation import Generation
from models.sink_lm.tokenizer import Tokenizer
from serve.lm_answers import Replay, RunningAnswer, Source
from serve.lm_contract import TAIL, Feed, Options, SessionState, Start, Started
from serve.lm_desk import Desk
from serve.lm_engine_thread import EngineThread
from serve.lm_held import Held, io
from serve.lm_model import generation_request
from serve.lm_refusals import (
    NO_RETRY,
    Refusal,
    cannot_follow,
    check_resume,
    log_failed,
    replaced,
    session_busy,
)
from serve.lm_sessions import SessionTable
from serve.lm_text import AnswerText
from serve.session_store import Turn

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
        capacity: int,
    ) -> None:
        self._engine, self._thread = engine, thread
        self._sessions, self._desk = sessions, desk
        self._tokenizer, self._capacity = tokenizer, capacity

    async def start(self, start: Start) -> Started:
        """Feeds a prompt and begins to answer it; see `Start`."""
        async with self._desk.locks.get(start.request_id):
            await self._desk.end(start.request_id)  # what a call made that is repeated now
            if start.session_id is None:
                return await self._start_temporary(start)
            async with self._sessions.locked(start.session_id):
                held = await self._sessions.take(start.session_id, create=bool(start.feeds))
                return await self._start_session(held, start)

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
        self._desk.put(start.request_id, RunningAnswer(sources, kept=None))
        return Started(
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
        text = AnswerText(self._tokenizer, start.options, before, answered=0)
        generation = await self._submit(held.session_id, tokens, start.options)
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
        options, stop = start.options, held.log.position
        before = await self._before(held, position)
        answered = min(len(before), position - held.turn.answer_from)
        text = AnswerText(self._tokenizer, options, before, answered=answered)

        async def begin(shown: int) -> Generation:
            limit = options.max_tokens
            rest = replace(
                options,
                max_tokens=None if limit is None else limit - shown,
                min_tokens=max(0, options.min_tokens - shown),
            )
            return await self._submit(held.session_id, (), rest)

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

    async def _submit(self, session_id: str, tokens: Sequence[int], options: Options) -> Generation:
        request = generation_request(options)
        return await self._thread.call(
            lambda: self._engine.submit(session_id, list(tokens), request)
        )


def _seeded(options: Options, number: int) -> Options:
    """Answers to one prompt differ though they have one seed."""
    if options.seed is None or number == 0:
        return options
    return replace(options, seed=options.seed + number)


def _temporary_name() -> str:
    return f"temporary-{uuid.uuid4().hex}"
