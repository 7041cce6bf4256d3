"""Sessions that begin with the same sink tokens: what one has read, the others copy.

Keys and values of a sink token depend on the tokens before it only, and it is never evicted. A
system prompt that many sessions pin is therefore read once, as long as one of them is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from models.sink_lm.engine.session import Session
from models.sink_lm.network.cache import Slabs


def share_prefix(session: Session, others: Iterable[Session], slabs: Slabs) -> None:
    """Gives a session that has read nothing yet the longest beginning that another one has read.

    Does nothing for a session whose request asks for log probabilities of its prompt, because they
    need the logits.

    Args:
        session: its pending tokens that are copied count as read; one of them always stays.
        others: sessions of the same slabs; `session` may be among them.
        slabs: the cache.
    """
    generation = session.generation
    wants_logits = generation is not None and generation.params.prompt_logprobs is not None
    if slabs.length(session.slot) or wants_logits:
        return
    read = {
        other.slot: min(common(session.prefix, other.prefix), slabs.length(other.slot))
        for other in others
    }
    source = max(read, key=read.__getitem__)
    count = min(read[source], len(session.pending) - 1)
    if count > 0:
        slabs.copy_prefix(source, session.slot, count)
        for _ in range(count):
            session.pending.popleft()


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns the length of the longest common beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
