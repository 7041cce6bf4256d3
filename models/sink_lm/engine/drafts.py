"""Guesses of a stream's next tokens from what the stream said before: prompt lookup.

After the last NGRAM tokens comes what came after them the last time (Saxena 2023, prompt lookup
decoding; Leviathan et al. 2023 for drafts in general). No second model is needed, and repetitions
are what long streams are full of.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
HISTORY = 4096
"""Tokens that are searched; at most twice as many are remembered."""
LONGEST_PAUSE = 32


class Drafter:
    """One session's guesses; they grow while they come true, and pause while they do not.

    Args:
        longest: tokens of one guess at most.
    """

    def __init__(self, longest: int) -> None:
        self._longest, self._width = longest, min(2, longest)
        self._pause = self._paused = 0
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._match: int | None = None

    def push(self, tokens: Sequence[int]) -> None:
        """Takes the stream's next tokens."""
        for token in tokens:
            self._tokens.append(token)
            last = tuple(self._tokens[-NGRAM:])
            self._match = self._ends.get(last)
            self._ends[last] = len(self._tokens)
        if len(self._tokens) > 2 * HISTORY:
            kept, self._tokens, self._ends = self._tokens[-HISTORY:], [], {}
            self.push(kept)

    def draft(self) -> list[int]:
        """Returns the likely next tokens, none where nothing like it came before."""
        if self._paused:
            self._paused -= 1
            return []
        if self._match is None:
            return []
        # What lies between the two places repeats, and may be shorter than the guess.
        period = len(self._tokens) - self._match
        return [self._tokens[self._match + i % period] for i in range(self._width)]

    def learn(self, drafted: int, accepted: int) -> None:
        """Hears how many tokens of the last guess came true."""
        if accepted == drafted:
            self._width = min(2 * self._width, self._longest)
        else:
            self._width = max(accepted, 1)
        self._pause = 0 if accepted else min(2 * self._pause + 1, LONGEST_PAUSE)
        self._paused = self._pause
