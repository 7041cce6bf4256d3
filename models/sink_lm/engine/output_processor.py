"""Finds stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text pass up to the first stop string, across the borders of the pieces it comes in.

    Holds back the longest end of the text that may still become a stop string: at most one
    character less than the longest of them.

    Args:
        stops: strings that end a text; empty ones are refused.

    Raises:
        ValueError: an empty stop string, which would end every text at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("stop: an empty string stops everything")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece.

        Returns:
            The text that may be shown, and the stop string that ended it, if any. Of several that
            match, the one that begins first counts, then the longest.
        """
        text = self._held + text
        found = [(text.index(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, _, stop = min(found)
            self._held = ""
            return text[:start], stop
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    @property
    def held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def flush(self) -> str:
        """What was held back, once it is clear that nothing follows."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, `stop` itself left out."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
