"""From a request to generations in progress: slabs, prompts, resumed streams."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from models.sink_lm.engine.engine import Engine
from models.sink_lm.engine.generation import Generation
from models.sink_lm.engine.output import Token
from models.sink_lm.engine.output_processor import OutputProcessor
from models.sink_lm.engine.sampling_params import SamplingParams
from models.sink_lm.network.cache import NoFreeSlab
from serve.ingress.errors import ApiError
from serve.lm.contract import TAIL, Feed, SessionState, Start, Started
from serve.lm.replica.active_generations import ActiveGenerations
from serve.lm.replica.engine_thread import EngineThread
from serve.lm.replica.generations import ActiveGeneration, ChoiceStream, Replay
from serve.lm.replica.refusals import (
    NO_RETRY,
    cannot_follow,
    check_resume,
    log_failed,
    nobody_waits,
    replaced,
    session_busy,
)
from serve.lm.replica.resident_session import ResidentSession
from serve.lm.replica.session_table import SessionTable
from serve.lm.replica.slab_queue import SlabQueue
from serve.lm.replica.tasks import io
from serve.lm.store.session_store import Turn

RESUME_CONTEXT = 512
"""Tokens before a resumed position that are decoded again: more than a stop string has."""


class Scheduler:
    """Starts the generations of requests, each as soon as it has its slabs.

    Args:
        engine: generates the answers.
        thread: runs the engine.
        sessions: the sessions to generate in.
        active: where started generations are registered.
        tokenizer: the model's.
        queue: where requests wait for a slab.
        capacity: tokens that a session sees.
    """

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread,
        sessions: SessionTable,
        active: ActiveGenerations,
        tokenizer: Tokenizer,
        *,
        queue: SlabQueue,
        capacity: int,
    ) -> None:
        self._queue = queue
        self._engine, self._thread = engine, thread
        self._sessions, self._active = sessions, active
        self._tokenizer, self._capacity = tokenizer, capacity

    async def start(self, start: Start) -> Started:
        """Starts a request's generations; see `Start`.

        Raises:
            ApiError: the request is refused.
        """
        async with self._active.locks.get(start.request_id):
            # Generations of an earlier call, if this one repeats it.
            await self._active.end(start.request_id)
            with self._active.expect(start.request_id) as gone:
                if start.session_id is None:
                    return await self._start_temporary(start, gone)
                return await self._start_in_session(start.session_id, start, gone)

    async def _start_in_session(
        self, session_id: str, start: Start, gone: asyncio.Event
    ) -> Started:
        async def attempt() -> Started:
            async with self._sessions.locked(session_id):
                session = await self._sessions.take(session_id, create=bool(start.feeds))
                return await self._start_session(session, start)

        if self._sessions.get(session_id) is not None:  # it has a slab, so it need not wait for one
            with contextlib.suppress(NoFreeSlab):  # the slab was taken meanwhile
                return await attempt()
        return await self._queue.run(attempt, 1, gone)

    async def _start_temporary(self, start: Start, gone: asyncio.Event) -> Started:
        """Opens a stream for every answer; answers to one prompt share its prefill."""
        names = [_temporary_name() for _ in range(len(start.feeds) * start.n)]
        await self._queue.run(partial(self._open, names), len(names), gone)
        try:
            choices = []
            for number, feed in enumerate(start.feeds):
                own = names[number * start.n : (number + 1) * start.n]
                choices += await self._choices(feed, own, start.params, gone)
        except BaseException:
            await self._sessions.close_temporary(names)
            raise
        self._active.put(start.request_id, ActiveGeneration(choices, session_id=None))
        return Started(
            prompt_tokens=sum(len(feed.start) for feed in start.feeds),
            cached_tokens=0,
            session=None,
            position=len(start.feeds[0].start),
        )

    async def _open(self, names: Sequence[str]) -> None:
        """Takes all the slabs or none: requests that hold some and wait for more could deadlock."""
        opened: list[str] = []
        try:
            for name in names:
                await self._sessions.open_temporary(name)
                opened.append(name)
        except BaseException:
            await self._sessions.close_temporary(opened)
            raise

    async def _choices(
        self, feed: Feed, names: Sequence[str], params: SamplingParams, gone: asyncio.Event
    ) -> list[ChoiceStream]:
        """Starts the answers to one prompt, each in a stream of its own."""
        if len(names) == 1:
            return [ChoiceStream(names[0], await self._submit(names[0], feed.start, params))]
        prompt = await self._read(names[0], feed.start, params, gone)
        state = await self._thread.call(partial(self._engine.export, names[0]))
        await self._sessions.refill_temporary(names[1:], state)
        rest, choices = replace(params, prompt_logprobs=None), []
        for number, name in enumerate(names):
            generation = await self._submit(name, (), _seeded(rest, number))
            choices.append(ChoiceStream(name, generation, prompt=prompt))
        return choices

    async def _read(
        self, name: str, prompt: Sequence[int], params: SamplingParams, gone: asyncio.Event
    ) -> list[Token]:
        """Reads a prompt but for its last token; returns its tokens if they are to be reported."""
        only = SamplingParams(max_tokens=0, prompt_logprobs=params.prompt_logprobs)
        reading, tokens = await self._submit(name, prompt, only), []
        while not reading.done:
            if gone.is_set():
                raise nobody_waits()
            events = reading.take(max_events=1024)
            tokens += [event for event in events if isinstance(event, Token)]
            await asyncio.sleep(0.005)
        return tokens

    async def _start_session(self, session: ResidentSession, start: Start) -> Started:
        repeated = session.turn.request_id == start.request_id
        if start.goes_on and not repeated:
            raise replaced(session.session_id)
        if session.active_request is not None:
            # Whoever resumes is the reader whose stream broke: nobody reads the old answer now.
            if start.resume_at is None and not repeated:
                raise session_busy(session.session_id)
            await self._active.end(session.active_request)
        if start.resume_at is not None:
            check_resume(start.resume_at, session.log.position, session.turn.answer_from)
            if not repeated:
                await self._turn(session, replace(session.turn, request_id=start.request_id))
            return await self._resume(session, start, start.resume_at)
        if repeated and session.log.position >= session.turn.answer_from:
            return await self._resume(session, start, session.turn.answer_from)
        return await self._feed(session, start, repeated=repeated)

    async def _feed(self, session: ResidentSession, start: Start, *, repeated: bool) -> Started:
        tokens = await self._begin_turn(session, start, repeated=repeated)
        state = session.state(self._capacity, extra=len(tokens))
        before = (*session.tail, *tokens)[-TAIL:]  # may end inside a character
        output = self._output(start.params)
        output.resume(before, answered=0)
        generation = await self._submit(session.session_id, tokens, start.params, output)
        if session.failure is not None:
            generation.cancel()
            raise log_failed(session.failure)
        choice = ChoiceStream(session.session_id, generation, session=session)
        return self._started(session, start, choice, len(tokens), state)

    async def _begin_turn(
        self, session: ResidentSession, start: Start, *, repeated: bool
    ) -> tuple[int, ...]:
        """Stores where the prompt and its answer will lie; returns the tokens to feed."""
        position = session.log.position
        if repeated:  # the replica died while it logged the prompt: feed the rest
            before = session.turn.prompt_from
            tail = tuple(await io(partial(session.log.read, max(0, before - TAIL), before)))
            return start.feeds[0].after(before, tail)[position - before :]
        if position and start.feeds and start.feeds[0].problem:
            raise cannot_follow(start.feeds[0].problem)
        tokens = start.feeds[0].after(position, tuple(session.tail)) if start.feeds else ()
        if position == 0 and not tokens:
            raise ApiError(400, "empty_input", "an empty session needs a prompt", param="prompt")
        turn = Turn(
            request_id=start.request_id,
            prompt_from=position,
            answer_from=position + len(tokens),
        )
        await self._turn(session, turn)
        return tokens

    async def _turn(self, session: ResidentSession, turn: Turn) -> None:
        if session.stored is not None:
            await io(partial(session.stored.begin_turn, turn))
        session.turn = turn

    async def _resume(self, session: ResidentSession, start: Start, position: int) -> Started:
        """Replays the log after `position`, then generates from its end."""
        params, stop = start.params, session.log.position
        before = await self._before(session, position)
        answered = min(len(before), position - session.turn.answer_from)
        output = self._output(params)
        end = output.resume(before, answered=answered)
        if position < stop:
            end = None  # the stream has more tokens, so the answer did not end there

        async def begin() -> Generation:
            return await self._submit(session.session_id, (), params, output)

        replay = Replay(log=session.log, position=position, stop=stop, output=output, begin=begin)
        choice = ChoiceStream(
            session.session_id, session=session, replay=None if end else replay, end=end
        )
        state = replace(session.state(self._capacity), stream_position=position)
        return self._started(session, start, choice, 0, state)

    async def _before(self, session: ResidentSession, position: int) -> list[int]:
        """Returns the last tokens of the stream before `position`, for the text after them."""
        if not session.log.position:
            raise ApiError(400, "empty_input", "an empty session needs a prompt", param="prompt")
        if session.stored is not None:
            first = max(0, position - RESUME_CONTEXT)
            return await io(partial(session.log.read, first, position))
        if position < session.log.position:
            message = "this server keeps no log of its sessions: resume at its end"
            raise ApiError(409, "no_log", message, headers=NO_RETRY)
        return list(session.tail)

    def _started(
        self,
        session: ResidentSession,
        start: Start,
        choice: ChoiceStream,
        prompt_tokens: int,
        state: SessionState,
    ) -> Started:
        self._active.put(
            start.request_id, ActiveGeneration([choice], session_id=session.session_id), session
        )
        return Started(
            prompt_tokens=prompt_tokens,
            cached_tokens=min(state.stream_position - prompt_tokens, self._capacity - 1),
            session=state,
            position=state.stream_position,
        )

    def _output(self, params: SamplingParams) -> OutputProcessor:
        """Returns the output of a session's answer, whose stream may go on in another request."""
        return OutputProcessor(params, self._tokenizer, keeps_partial=True)

    async def _submit(
        self,
        session_id: str,
        tokens: Sequence[int],
        params: SamplingParams,
        output: OutputProcessor | None = None,
    ) -> Generation:
        return await self._thread.call(
            lambda: self._engine.submit(session_id, list(tokens), params, output)
        )


def _seeded(params: SamplingParams, number: int) -> SamplingParams:
    """Gives each answer to a prompt a seed of its own, for otherwise they would be the same."""
    if params.seed is None or number == 0:
        return params
    return replace(params, seed=params.seed + number)


def _temporary_name() -> str:
    return f"temporary-{uuid.uuid4().hex}"
