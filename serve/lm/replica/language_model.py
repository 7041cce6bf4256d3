"""The language model's replica: one engine, one thread that runs it, and its sessions."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException

from models.sink_lm.checkpoints.dtypes import dtype_of
from models.sink_lm.checkpoints.loading import load_model
from models.sink_lm.checkpoints.tokenizer import Tokenizer, load_tokenizer
from models.sink_lm.engine.engine import Engine
from models.sink_lm.engine.output import End
from models.sink_lm.network.llama import Llama
from models.sink_lm.network.tuning import tune
from serve.ingress.errors import ApiError
from serve.lm.contract import LMCard, Piece, Refusal, SessionState, Start, Started, Taken
from serve.lm.replica.active_generations import ActiveGenerations
from serve.lm.replica.engine_thread import EngineThread
from serve.lm.replica.maintenance import Maintenance
from serve.lm.replica.refusals import NO_RETRY, session_busy
from serve.lm.replica.resident_session import ResidentSession
from serve.lm.replica.scheduler import Scheduler
from serve.lm.replica.session_table import SessionTable
from serve.lm.replica.slab_queue import SlabQueue
from serve.lm.replica.tasks import CallsInProgress, in_background, in_full, with_name
from serve.lm.settings import LMSettings
from serve.lm.store.session_store import SessionStore
from serve.telemetry import Reporter

QUEUE_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class LanguageModel:
    """Serve deployment around an `Engine`. Its methods always run to their end: see `in_full`.

    Args:
        settings: see `LMSettings`.
        telemetry: handle of the `Telemetry` deployment.
    """

    def __init__(self, settings: LMSettings, telemetry: Any) -> None:
        self._settings = settings
        self.calls = CallsInProgress()
        device = "cuda" if settings.gpus else "cpu"
        dtype = dtype_of(settings.dtype, settings.model, device)
        model = load_model(settings.model, dtype=dtype, device=device, kernels=settings.kernels)
        self._tokenizer = load_tokenizer(settings.model)
        self._engine = Engine(
            model,
            self._tokenizer,
            sessions=settings.sessions,
            capacity=settings.cache,
            prefill_chunk=settings.prefill_chunk,
            max_buffered=settings.max_buffered,
            draft_tokens=settings.draft_tokens,
            journal=self._journal,
        )
        self._card, self._name = self._make_card(model), _replica_name()
        tune(model)  # after the card, whose fingerprint reads the weights
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
        self._active = ActiveGenerations(self._sessions)
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
        self._scheduler = Scheduler(
            self._engine,
            self._thread,
            self._sessions,
            self._active,
            self._tokenizer,
            queue=self._queue,
            capacity=settings.cache,
        )
        self._maintenance = Maintenance(settings, self._sessions, self._active)
        self._metrics(telemetry)

    async def describe(self) -> LMCard:
        """Describes the model."""
        return self._card

    async def works_on(self, call_id: str) -> bool:
        """Whether a call is in progress here, and not lost with the replica that it went to."""
        return call_id in self.calls

    def check_health(self) -> None:
        """Called by Serve every few seconds.

        Raises:
            RuntimeError: the engine's thread or the maintenance has stopped.
        """
        self._thread.check()
        self._maintenance.check()

    @with_name
    async def start(self, start: Start) -> Started | ApiError | Refusal:
        """Starts a request's generations; see `Start`. Feeds of another model are refused.

        If the caller goes away meanwhile, nobody will read the answer, and it is ended.
        """
        if self._is_other(start.release):
            return Refusal(self._card)
        try:
            started = await self._start(start)
            if isinstance(started, Started):
                started = replace(started, replica=self._name)
            return started
        except asyncio.CancelledError:
            in_background(self._end(start.request_id))
            raise

    @in_full
    async def _start(self, start: Start) -> Started:
        return await self._scheduler.start(start)

    @in_full
    async def take(self, request_id: str, max_tokens: int, wait_s: float) -> Taken:
        """Returns what is new since the last call, after waiting up to `wait_s` seconds for it."""
        running = self._active.get(request_id)
        if running is None:
            return Taken(pieces=(Piece(index=0, tokens=(), end=End(reason="lost")),))
        pieces = await running.take(max_tokens, wait_s)
        self._generated.inc(sum(piece.made for piece in pieces))
        session = self._sessions.get(running.session_id) if running.session_id is not None else None
        if running.ended and self._active.get(request_id) is running:
            await self._active.forget(request_id)
        return Taken(
            pieces=pieces, session=None if session is None else session.state(self._settings.cache)
        )

    async def hold(self, request_id: str) -> None:
        """Returns once an answer has ended; Serve drains a replica until no call is in progress."""
        await self._active.over(request_id)

    @with_name
    @in_full
    async def cancel(self, request_id: str) -> None:
        """Ends a request's answer at a token boundary once it has begun; its session stays."""
        await self._end(request_id)

    async def _end(self, request_id: str) -> None:
        self._active.leave(request_id)
        async with self._active.locks.get(request_id):
            await self._active.end(request_id)

    @with_name
    @in_full
    async def create(
        self,
        session_id: str,
        sinks: int | None,
        pinned: Sequence[int],
        ttl_s: float | None,
        request_id: str,
        release: str = "",
    ) -> SessionState | Refusal:
        """Creates a session; a repeated call returns the session that the first one created.

        Args:
            session_id: its name.
            sinks: sink tokens; None takes the default.
            pinned: tokens that begin the stream.
            ttl_s: idle seconds until it is deleted; None takes the default.
            request_id: the same for a repeated call.
            release: see `Start`; of the pinned tokens.
        """
        if self._is_other(release):
            return Refusal(self._card)
        async with self._sessions.locked(session_id):
            session = await self._sessions.create(
                session_id, sinks=sinks, pinned=pinned, ttl_s=ttl_s, request_id=request_id
            )
            return session.state(self._settings.cache)

    @with_name
    @in_full
    async def describe_session(self, session_id: str) -> SessionState:
        """Describes a session."""
        return await self._sessions.describe(session_id)

    @with_name
    async def list_sessions(self) -> list[SessionState]:
        """Describes all sessions, those with a slab here and those that are stored."""
        found = []
        for name in await self._sessions.names():
            try:
                found.append(await self._sessions.describe(name))
            except ApiError:
                continue  # expired or deleted meanwhile
        return found

    @with_name
    @in_full
    async def delete(self, session_id: str) -> None:
        """Deletes a session and ends its answer, if it is generating one."""
        async with self._sessions.locked(session_id):
            await self._sessions.describe(session_id)
            session = self._sessions.get(session_id)
            if session is not None and session.active_request is not None:
                await self._active.end(session.active_request)
            await self._sessions.delete(session_id)

    @with_name
    @in_full
    async def fork(self, session_id: str, new_id: str, request_id: str) -> SessionState:
        """Creates a second session with the same stream; a repeated call returns that session."""
        async with self._sessions.locked(session_id, new_id):
            return await self._sessions.fork(await self._idle(session_id), new_id, request_id)

    @with_name
    @in_full
    async def snapshot(self, session_id: str) -> SessionState:
        """Stores a session's keys and values now."""
        async with self._sessions.locked(session_id):
            session = await self._sessions.take(session_id, create=False)
            await self._sessions.snapshot(session)
            return session.state(self._settings.cache)

    @with_name
    @in_full
    async def restore(self, session_id: str) -> SessionState:
        """Drops a session's keys and values and loads them from the store again."""
        async with self._sessions.locked(session_id):
            session = await self._idle(session_id)
            if session.stored is None:
                raise ApiError(409, "no_store", "this server stores no sessions", headers=NO_RETRY)
            await self._sessions.drop(session)
            session = await self._sessions.take(session_id, create=False)
            return session.state(self._settings.cache)

    def _journal(self, session_id: str, tokens: Sequence[int]) -> None:
        self._sessions.journal(session_id, tokens)

    async def _idle(self, session_id: str) -> ResidentSession:
        session = await self._sessions.take(session_id, create=False)
        if session.active_request is not None:
            raise session_busy(session_id)
        return session

    def _is_other(self, release: str) -> bool:
        """Whether tokens were made for another model than this one."""
        return release not in ("", self._card.release)

    def _make_card(self, model: Llama) -> LMCard:
        settings, name = self._settings, self._settings.name or "model"
        own = fingerprint(model, self._tokenizer, settings.cache)
        told = f"{own} {name} {self._tokenizer.fingerprint}"
        return LMCard(
            name=name,
            created=int(time.time()),
            vocab_size=model.cfg.vocab_size,
            capacity=settings.cache,
            sinks=settings.sinks,
            sessions=settings.sessions,
            bytes_per_session=self._engine.slabs.bytes_per_session,
            fingerprint=own,
            persistent=settings.store is not None,
            model=settings.model,
            release=hashlib.sha256(told.encode()).hexdigest(),
        )

    def _metrics(self, telemetry: Any) -> None:
        registry = CollectorRegistry()
        self._generated = Counter(
            "rayjepa_generated_tokens", "Tokens generated and taken", registry=registry
        )
        answers = Gauge("rayjepa_answers", "Answers in progress", registry=registry)
        answers.set_function(lambda: len(self._active))
        resident = Gauge("rayjepa_sessions_in_memory", "Sessions with a slab", registry=registry)
        resident.set_function(lambda: len(self._sessions.resident()))
        queued = Gauge(
            "rayjepa_queued_requests", "Requests that wait for a slab", registry=registry
        )
        queued.set_function(lambda: len(self._queue))
        registry.register(self._queue_wait_s)
        self._reporter = Reporter(registry, telemetry)


def _replica_name() -> str:
    """Returns Serve's name of this replica; empty outside Serve."""
    try:
        return str(ray_serve.get_replica_context().replica_tag)
    except RayServeException:
        return ""


def fingerprint(model: Llama, tokenizer: Tokenizer, capacity: int) -> str:
    """Returns a name for the model's weights, cache shape and vocabulary.

    It hashes the capacity, the bytes of every token, and of every tensor its type, its shape and 64
    values. A checksum of every byte would take a minute for a large model.
    """
    digest = hashlib.sha256(f"{model.cfg} {capacity}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.numpy().tobytes())
    for token in range(tokenizer.vocab_size):
        digest.update(b"%d %b" % (token, tokenizer.token_bytes(token)))
    return f"sink-{digest.hexdigest()[:16]}"
