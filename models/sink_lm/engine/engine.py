"""Many endless sessions in one decode batch: continuous batching over static slabs.

A session's stream is the list of all its tokens, both of prompts and sampled. A slab is the cache
memory of one session; its content follows from the stream's tokens that the model has read. Tokens
that were accepted but not read yet (a prompt, or the token sampled last) wait in `pending`. One
tick reads at most one chunk of prompts, of one session or of several that share it, then one token
of every session that generates. Nothing here grows with a stream: its tokens are kept by the
journal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from models.sink_lm.engine.drafts import Drafter
from models.sink_lm.engine.generation import Generation
from models.sink_lm.engine.model_runner import ModelRunner
from models.sink_lm.engine.output_processor import OutputProcessor
from models.sink_lm.engine.prefix_sharing import share_prefix
from models.sink_lm.engine.sampling import Choice, choose
from models.sink_lm.engine.sampling_params import SamplingParams
from models.sink_lm.engine.session import (
    Session,
    SessionBusy,
    SessionExists,
    SessionInfo,
    UnknownSession,
)
from models.sink_lm.engine.tick_lock import TickLock
from models.sink_lm.network.llama import Llama

Journal = Callable[[str, Sequence[int]], None]

log = logging.getLogger(__name__)


class Engine:
    """Owns the cache. One thread calls `tick`; any thread may call the other methods.

    Args:
        model: the decoder.
        tokenizer: its tokenizer.
        sessions: number of slabs.
        capacity: tokens a session sees at most, see `Slabs`.
        prefill_chunk: prompt tokens read between two decode steps, of all sessions together.
        max_buffered: unread events of an answer at which its session pauses.
        draft_tokens: tokens guessed from the stream's own past (drafts.py) and checked in one step
            while a single session generates; 0 for none.
        by_bucket: decode with static shapes, on CUDA as graphs (models/sink_lm/network/buckets.py).
        journal: called with a session's name and its new tokens before anyone sees them. If it
            raises, the tokens do not enter the stream: `submit` and `extend` raise too, and an
            answer ends as `error`. Like an answer's `notify` it may be called within a tick, and
            must not call the engine.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        sessions: int,
        capacity: int,
        prefill_chunk: int = 128,
        max_buffered: int = 256,
        draft_tokens: int = 0,
        by_bucket: bool = False,
        journal: Journal | None = None,
    ) -> None:
        for name, size in (("prefill_chunk", prefill_chunk), ("max_buffered", max_buffered)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.model, self.tokenizer = model, tokenizer
        self._runner = ModelRunner(model, sessions=sessions, capacity=capacity, by_bucket=by_bucket)
        self.slabs = self._runner.slabs
        self._prefill_chunk, self._max_buffered = prefill_chunk, max_buffered
        self._draft_tokens, self._journal = draft_tokens, journal
        self._sessions: dict[str, Session] = {}
        self._turn: deque[str] = deque()  # sessions whose prompt is being read, in turn
        self._lock = TickLock()
        self._work = threading.Event()

    def open(self, session_id: str, *, sinks: int = 4) -> None:
        """Starts an empty stream.

        Raises:
            SessionExists: the name is taken.
            NoFreeSlab: every slab is in use.
            ValueError: more sinks than leave a window.
        """
        with self._lock.between_ticks():
            if session_id in self._sessions:
                raise SessionExists(session_id)
            drafter = Drafter(self._draft_tokens) if self._draft_tokens else None
            self._sessions[session_id] = Session(self.slabs.allocate(sinks), drafter=drafter)

    def close(self, session_id: str) -> None:
        """Ends a session; an answer that it generates ends as cancelled.

        Raises:
            UnknownSession: there is none.
        """
        with self._lock.between_ticks():
            session = self._get(session_id)
            if session.generation is not None:
                session.generation.end("cancelled")
            self.slabs.release(session.slot)
            del self._sessions[session_id]

    def sessions(self) -> list[str]:
        """Returns the names of all sessions, the one unused for longest first."""
        with self._lock.between_ticks():
            return sorted(self._sessions, key=lambda name: self._sessions[name].used_at)

    def info(self, session_id: str) -> SessionInfo:
        """Describes a session.

        Raises:
            UnknownSession: there is none.
        """
        with self._lock.between_ticks():
            return self._get(session_id).describe(self.slabs)

    def submit(
        self,
        session_id: str,
        tokens: Sequence[int],
        params: SamplingParams,
        output: OutputProcessor | None = None,
    ) -> Generation:
        """Appends a prompt and generates after it.

        Args:
            session_id: an open session.
            tokens: the prompt. It may be empty if the stream is not: the stream then goes on.
            params: how to generate.
            output: state of an answer that began earlier; None begins a new answer.

        Raises:
            UnknownSession: there is none.
            SessionBusy: it is generating.
            ValueError: the prompt or the parameters name a token that does not exist, or both the
                prompt and the stream are empty.
        """
        with self._lock.between_ticks():
            session = self._get(session_id)
            if session.busy:
                raise SessionBusy(session_id)
            self._check_tokens(tokens)
            if not tokens and not session.pending:
                raise ValueError("an empty prompt needs a stream to go on from")
            generation = Generation(
                params,
                output or OutputProcessor(params, self.tokenizer),
                vocab_size=self.model.cfg.vocab_size,
                max_buffered=self._max_buffered,
                on_room=self._work.set,
            )
            is_first = session.position(self.slabs) == 0
            self._append(session_id, session, tokens)
            session.generation, session.used_at = generation, time.monotonic()
            if is_first and params.prompt_logprobs is not None:
                generation.accept_prompt([Choice(tokens[0])])  # nothing comes before it
        self._work.set()
        return generation

    def extend(self, session_id: str, tokens: Sequence[int]) -> None:
        """Appends tokens and reads all but the last, in the caller's thread, between ticks.

        Raises:
            UnknownSession: there is none, or it was closed meanwhile.
            SessionBusy: it is generating.
            ValueError: a token does not exist.
        """
        with self._lock.between_ticks():
            session = self._idle(session_id)
            self._check_tokens(tokens)
            self._append(session_id, session, tokens)
        while len(session.pending) > 1:
            with self._lock.between_ticks():
                self._read([(self._idle(session_id), self._prefill_chunk)])

    def fork(self, session_id: str, new_id: str) -> None:
        """Opens a second session with the same stream.

        Raises:
            UnknownSession: there is none.
            SessionBusy: it is generating.
            SessionExists: the new name is taken.
            NoFreeSlab: every slab is in use.
        """
        with self._lock.between_ticks():
            source = self._idle(session_id)
            self.open(new_id, sinks=self.slabs.sinks(source.slot))
            target = self._sessions[new_id]
            self.slabs.copy(source.slot, target.slot)
            target.pending, target.prefix = source.pending.copy(), source.prefix.copy()

    def export(self, session_id: str) -> dict[str, Tensor]:
        """Copies a session's state as of the last tick, whether it generates or not.

        Returns:
            What `Slabs.export` returns, and `pending`, int64: accepted tokens not yet read.

        Raises:
            UnknownSession: there is none.
        """
        with self._lock.between_ticks():
            session = self._get(session_id)
            pending = torch.tensor([*session.pending], dtype=torch.long)
            return self.slabs.export(session.slot) | {"pending": pending}

    def restore(self, session_id: str, state: dict[str, Tensor], tail: Sequence[int] = ()) -> None:
        """Opens a session from an exported state and the tokens the journal has after it.

        Args:
            session_id: a new name.
            state: from `export`.
            tail: tokens after the state's position, which counts its pending tokens too.

        Raises:
            SessionExists: the name is taken.
            NoFreeSlab: every slab is in use.
            ValueError: the state is damaged, or belongs to another model or cache size.
        """
        with self._lock.between_ticks():
            missing = {"keys", "values", "length", "sinks", "pending"} - state.keys()
            if missing:
                raise ValueError(f"state has no {', '.join(sorted(missing))}")
            pending = [*state["pending"].tolist(), *tail]
            self._check_tokens(pending)
            self.open(session_id, sinks=int(state["sinks"]))
            session = self._sessions[session_id]
            try:
                self.slabs.restore(session.slot, state)
            except BaseException:
                self.close(session_id)
                raise
            session.pending = deque(pending)
        self._work.set()

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """Blocks until a tick may have something to do; False after `timeout` seconds."""
        return self._work.wait(timeout)

    def tick(self) -> bool:
        """Reads one chunk of prompts and one token of every session that generates.

        Returns:
            Whether there was anything to do.
        """
        with self._lock.tick():
            self._work.clear()
            self._end_cancelled()
            worked = self._prefill() | self._decode()
            if worked:
                self._work.set()
            return worked

    def _prefill(self) -> bool:
        """Reads one chunk, of the prompt whose turn it is and of the next ones if it is short.

        A restored stream may have a prompt too.
        """
        waiting = {name for name, session in self._sessions.items() if session.has_prompt}
        self._turn = deque(name for name in self._turn if name in waiting)
        self._turn.extend(sorted(waiting.difference(self._turn)))
        if not self._turn:
            return False
        left, chosen = self._prefill_chunk, []
        for name in list(self._turn):
            if left:
                session = self._sessions[name]
                share_prefix(session, self._sessions.values(), self.slabs)
                chosen.append((session, left))
                left -= min(left, len(session.pending) - 1)
                self._turn.rotate(-1)
        self._read(chosen)
        return True

    def _read(self, chosen: Sequence[tuple[Session, int]]) -> None:
        """Moves up to so many pending tokens into the cache; leaves the last to the decoder."""
        sizes = [(session, min(count, len(session.pending) - 1)) for session, count in chosen]
        chunks = [
            (session, [session.pending[i] for i in range(size + 1)])
            for session, size in sizes
            if size > 0
        ]
        if not chunks:
            return
        slots = [session.slot for session, _ in chunks]
        read = self._runner.read([ids[:-1] for _, ids in chunks], slots)
        for (session, ids), x_TE in zip(chunks, read, strict=True):
            for _ in ids[:-1]:
                session.pending.popleft()
            generation = session.generation
            if generation is not None and generation.params.prompt_logprobs is not None:
                for choices in self._runner.score(x_TE, ids[1:], generation.params.prompt_logprobs):
                    generation.accept_prompt(choices)

    def _decode(self) -> bool:
        """Feeds the last pending token of each session, and samples the next."""
        running = [(name, s) for name, s in self._sessions.items() if s.is_running]
        ready = [(name, s) for name, s in running if len(s.pending) == 1 and not s.end_if_read()]
        if not ready:
            return False
        if len(running) == 1 and self._look_ahead(*ready[0]):
            return True
        ready.sort(key=lambda item: item[1].slot)
        tokens = [session.pending[0] for _, session in ready]
        logits_BV = self._runner.decode(tokens, [session.slot for _, session in ready])
        generations = [s.generation for _, s in ready if s.generation is not None]
        choices = choose(logits_BV, [generation.sampler for generation in generations])
        for _, session in ready:
            session.pending.clear()
        for (name, session), generation, choice in zip(ready, generations, choices, strict=True):
            self._deliver(name, session, generation, choice)
        return True

    def _look_ahead(self, name: str, session: Session) -> bool:
        """Reads guesses behind the pending token, and takes tokens as long as they come true.

        Every token is sampled from the logits after the ones before it, so that its distribution is
        that of single steps. Returns whether there was a guess.
        """
        generation, drafter = session.generation, session.drafter
        if generation is None or drafter is None or not (draft := drafter.draft()):
            return False
        ahead = self._runner.look_ahead([session.pending[0], *draft], session.slot)
        if ahead is None:
            return False
        logits_TV, rows = ahead
        for place, logits_V in enumerate(logits_TV):
            choice = choose(logits_V[None], [generation.sampler])[0]
            rows.keep()
            session.pending.clear()
            self._deliver(name, session, generation, choice)
            goes_on = not (generation.ended or generation.cancelled or generation.is_paused)
            if draft[place : place + 1] != [choice.token] or not goes_on:
                break
        drafter.learn(len(draft), place)
        return True

    def _deliver(self, name: str, session: Session, generation: Generation, choice: Choice) -> None:
        """Hands an answer its token; a failure here ends this answer and no other."""
        session.used_at = time.monotonic()
        try:
            self._append(name, session, [choice.token])
            generation.accept(choice, session.position(self.slabs))
        except Exception as error:
            log.exception("session %s: the answer ends", name)
            generation.end("error", message=f"{type(error).__name__}: {error}")
        if generation.ended:
            session.generation = None

    def _append(self, name: str, session: Session, tokens: Sequence[int]) -> None:
        """Accepts tokens into a stream: the journal has them before anyone else."""
        if self._journal is not None and tokens:
            self._journal(name, tokens)
        if session.position(self.slabs) == len(session.prefix):  # all tokens so far, and all sinks
            room = self.slabs.sinks(session.slot) - len(session.prefix)
            session.prefix.extend(tokens[:room])
        session.pending.extend(tokens)
        if session.drafter is not None:
            session.drafter.push(tokens)

    def _end_cancelled(self) -> None:
        for session in self._sessions.values():
            if session.generation is not None and session.generation.cancelled:
                session.generation.end("cancelled")
                session.generation = None

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        vocab = self.model.cfg.vocab_size
        wrong = [token for token in tokens if not 0 <= token < vocab]
        if wrong:
            raise ValueError(f"token {wrong[0]} is not below {vocab}")

    def _get(self, session_id: str) -> Session:
        if session_id not in self._sessions:
            raise UnknownSession(session_id)
        return self._sessions[session_id]

    def _idle(self, session_id: str) -> Session:
        session = self._get(session_id)
        if session.busy:
            raise SessionBusy(session_id)
        return session
