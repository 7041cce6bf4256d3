"""The language model's replica: one engine, one thread that runs it, and its sessions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.checkpoints.tokenizer import load_tokenizer
from models.sink_lm.engine.engine import Engine
from models.sink_lm.network.llama import Llama
from serve.lm.contract import End, LMCard, Piece, Refused, SessionState, Start, Started, Taken
from serve.lm.replica.active_generations import Desk
from serve.lm.replica.engine_thread import EngineThread
from serve.lm.replica.maintenance import Housekeeper
from serve.lm.replica.model import fingerprint
from serve.lm.replica.refusals import NO_RETRY, Refusal, session_busy
from serve.lm.replica.resident_session import Held
from serve.lm.replica.scheduler import Starter
from serve.lm.replica.session_table import SessionTable
from serve.lm.replica.slab_queue import SlabQueue
from serve.lm.replica.tasks import in_background, in_full
from serve.lm.settings import LMSettings
from serve.lm.store.session_store import SessionStore
from serve.telemetry import Reporter

QUEUE_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300)

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


class LanguageModel:
    """Serve deployment around an `Engine`. What its methods begin they finish: see `in_full`.

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
        self._desk = Desk(self._sessions)
        self._queue_wait_s = Histogram(
            "rayjepa_queue_wait_seconds",
            "Time requests waited for a slab",
            buckets=QUEUE_BUCKETS_S,
            registry=None,
        )
        self._queue = SlabQueue(
            settings.max_queued,
            settings.queue_timeout_s,
            room=self._sessions.room,
            waited=self._queue_wait_s.observe,
        )
        self._starter = Starter(
            self._engine,
            self._thread,
            self._sessions,
            self._desk,
            self._tokenizer,
            queue=self._queue,
            capacity=settings.cache,
        )
        self._housekeeper = Housekeeper(settings, self._sessions, self._desk)
        self._metrics(telemetry)

    async def describe(self) -> LMCard:
        """What is served here."""
        return self._card

    def check_health(self) -> None:
        """Called by Serve every few seconds; raises RuntimeError when something here is dead."""
        self._thread.check()
        self._housekeeper.check()

    async def start(self, start: Start) -> Started | Refused:
        """Feeds a prompt and begins to answer it; see `Start`.

        Nobody will read the answer of a caller who went away meanwhile: it is ended.
        """
        try:
            return await self._start(start)
        except asyncio.CancelledError:
            in_background(self._end(start.request_id))
            raise

    @in_full
    async def _start(self, start: Start) -> Started:
        return await self._starter.start(start)

    @in_full
    async def take(self, request_id: str, max_tokens: int, wait_s: float) -> Taken:
        """What an answer has made since the last call, after waiting for it up to `wait_s`."""
        running = self._desk.get(request_id)
        if running is None:
            return Taken(pieces=(Piece(index=0, tokens=(), end=End(reason="lost")),))
        pieces = await running.take(max_tokens, wait_s)
        self._generated.inc(sum(piece.made for piece in pieces))
        held = self._sessions.get(running.kept) if running.kept is not None else None
        if running.ended and self._desk.get(request_id) is running:
            await self._desk.forget(request_id)
        return Taken(
            pieces=pieces, session=None if held is None else held.state(self._settings.cache)
        )

    @in_full
    async def cancel(self, request_id: str) -> None:
        """Ends a request's answer at a token boundary, once it has begun; its session stays."""
        await self._end(request_id)

    async def _end(self, request_id: str) -> None:
        self._desk.leave(request_id)
        async with self._desk.locks.get(request_id):
            await self._desk.end(request_id)

    @in_full
    async def create(
        self,
        session_id: str,
        sinks: int | None,
        pinned: Sequence[int],
        ttl_s: float | None,
        request_id: str,
    ) -> SessionState:
        """Makes a session; a repeated call returns the one it has made."""
        async with self._sessions.locked(session_id):
            held = await self._sessions.create(
                session_id, sinks=sinks, pinned=pinned, ttl_s=ttl_s, request_id=request_id
            )
            return held.state(self._settings.cache)

    @in_full
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

    @in_full
    async def delete(self, session_id: str) -> None:
        """Removes a session and ends what it generates."""
        async with self._sessions.locked(session_id):
            await self._sessions.describe(session_id)
            held = self._sessions.get(session_id)
            if held is not None and held.answer is not None:
                await self._desk.end(held.answer)
            await self._sessions.delete(session_id)

    @in_full
    async def fork(self, session_id: str, new_id: str, request_id: str) -> SessionState:
        """Makes a second session with the same stream so far; repeated, returns that one."""
        async with self._sessions.locked(session_id, new_id):
            return await self._sessions.fork(await self._idle(session_id), new_id, request_id)

    @in_full
    async def snapshot(self, session_id: str) -> SessionState:
        """Stores a session's keys and values now."""
        async with self._sessions.locked(session_id):
            held = await self._sessions.take(session_id, create=False)
            await self._sessions.snapshot(held)
            return held.state(self._settings.cache)

    @in_full
    async def restore(self, session_id: str) -> SessionState:
        """Drops a session's keys and values and loads them from the store again."""
        async with self._sessions.locked(session_id):
            held = await self._idle(session_id)
            if held.stored is None:
                raise Refusal(409, "no_store", "this server stores no sessions", headers=NO_RETRY)
            await self._sessions.drop(held)
            held = await self._sessions.take(session_id, create=False)
            return held.state(self._settings.cache)

    def _journal(self, session_id: str, tokens: Sequence[int]) -> None:
        self._sessions.journal(session_id, tokens)

    async def _idle(self, session_id: str) -> Held:
        held = await self._sessions.take(session_id, create=False)
        if held.answer is not None:
            raise session_busy(session_id)
        return held

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
            fingerprint=fingerprint(model, self._tokenizer, settings.cache),
            persistent=settings.store is not None,
        )

    def _metrics(self, telemetry: Any) -> None:
        registry = CollectorRegistry()
        self._generated = Counter(
            "rayjepa_generated_tokens", "Tokens generated and taken", registry=registry
        )
        answers = Gauge("rayjepa_answers", "Answers in progress", registry=registry)
        answers.set_function(lambda: len(self._desk))
        held = Gauge("rayjepa_sessions_in_memory", "Sessions with a slab", registry=registry)
        held.set_function(lambda: len(self._sessions.held()))
        queued = Gauge(
            "rayjepa_queued_requests", "Requests that wait for a slab", registry=registry
        )
        queued.set_function(lambda: len(self._queue))
        registry.register(self._queue_wait_s)
        self._reporter = Reporter(registry, telemetry)
