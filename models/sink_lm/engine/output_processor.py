"""Turns an answer's tokens into text and decides where the answer ends."""

from __future__ import annotations

from collections.abc import Sequence

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from models.sink_lm.engine.output import End, FinishReason, Token
from models.sink_lm.engine.sampling import Choice
from models.sink_lm.engine.sampling_params import SamplingParams


class OutputProcessor:
    """The state of one answer: its text so far, and its end once it has one.

    An answer ends with the first of these: an end token, a stop string, `max_tokens`, or a call of
    `finish`. The answer may have begun in an earlier request, or its prompt may end inside a
    character: `resume` takes what came before, so that neither a character nor a stop string is cut
    at the border.

    Args:
        params: of the request. Its numbers of tokens count from the first one that is pushed.
        tokenizer: the model's.
        keeps_partial: whether a later request may go on with the stream. Bytes of an incomplete
            character at the end are then left to that request; otherwise they become U+FFFD.

    Attributes:
        tokens: tokens that were pushed.
        end: the answer's end; None while it goes on.
        end_ids: tokens that end the answer.
    """

    def __init__(
        self, params: SamplingParams, tokenizer: Tokenizer, *, keeps_partial: bool = False
    ) -> None:
        self._params, self._keeps_partial = params, keeps_partial
        self._stop_ids = frozenset(params.stop_token_ids)
        self.end_ids = self._stop_ids | set(() if params.ignore_eos else tokenizer.eos_ids)
        self.tokens = 0
        self.end: End | None = None
        self._text, self._stops = tokenizer.stream(), StopMatcher(params.stop)
        self._chars = 0

    @property
    def min_left(self) -> int:
        """Tokens that must still come before the answer may end by itself."""
        return max(0, self._params.min_tokens - self.tokens)

    @property
    def wants_nothing(self) -> bool:
        """Whether the prompt is only to be read: `max_tokens` is 0."""
        return self._params.max_tokens == 0

    def resume(self, before: Sequence[int], *, answered: int) -> End | None:
        """Takes the tokens of the stream before the first one that will be pushed.

        Args:
            before: the tokens.
            answered: how many of them, at their end, belong to the answer: their text may begin a
                stop string. The others can only begin a character.

        Returns:
            The end, when the reader already has every token and only the finish reason is missing.
        """
        end = None
        for number, token in enumerate(before):
            text = self._text.push(token)
            if number >= len(before) - answered and not self._params.min_tokens:
                stops = token in self.end_ids or self._stops.push(text)[1]
                end = End(reason="stop") if stops else None
        self._chars = self._stops.held_back  # shown with the first token, or after it
        return end

    def push(self, choice: Choice, position: int) -> Token:
        """Takes the next token; sets `end` if it is the last.

        Args:
            choice: the token.
            position: tokens in the stream, this one included.
        """
        may_end, offset = not self.min_left, self._chars
        self.tokens += 1
        if may_end and choice.token in self.end_ids:
            named = choice.token if choice.token in self._stop_ids else None
            self.finish("stop", stop=named)
            return Token(position, choice.token, "", choice.logprob, choice.top, offset)
        text, stop = self._text.push(choice.token), None
        self._chars += len(text)
        if may_end:
            text, stop = self._stops.push(text)
        if stop is not None:
            self.finish("stop", stop=stop)
        elif self.tokens == self._params.max_tokens:
            self.finish("length")
        return Token(position, choice.token, text, choice.logprob, choice.top, offset)

    def finish(
        self, reason: FinishReason, *, stop: str | int | None = None, message: str = ""
    ) -> End:
        """Ends the answer with the text that was held back, and returns the end."""
        text = ""
        if not isinstance(stop, str):  # a stop string cuts off what follows it
            text = self._stops.flush() + ("" if self._keeps_partial else self._text.flush())
        self.end = End(reason=reason, stop=stop, text=text, message=message)
        return self.end


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces.

    It holds back the longest end of the text that may still become a stop string, which is at most
    one character less than the longest stop string.

    Args:
        stops: strings that end the text.

    Raises:
        ValueError: a stop string is empty, which would end every text at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("stop: an empty string stops everything")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece.

        Returns:
            The text that may be shown, and the stop string that ended it, if any. If several match,
            the one that begins first counts, then the longest.
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
    def held_back(self) -> int:
        """Number of characters that are held back."""
        return len(self._held)

    def flush(self) -> str:
        """Returns the text that was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
