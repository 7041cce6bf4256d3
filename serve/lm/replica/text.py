"""The text of an answer's tokens, across the borders between requests."""

from __future__ import annotations

from collections.abc import Sequence

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from models.sink_lm.engine.output_processor import StopMatcher
from models.sink_lm.engine.sampling_params import SamplingParams
from serve.lm.contract import End, Token


class AnswerText:
    """The text of an answer that goes on where another reader or request left off.

    The engine decodes every generation afresh; this one knows what came before, so that neither a
    character nor a stop string is cut at the border.

    Args:
        tokenizer: the model's.
        params: of the request; its numbers of tokens count from the first one shown.
        before: tokens of the stream before the first one shown.
        answered: how many of them, at their end, belong to the same answer: their text may begin a
            stop string. The others may only begin a character.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, before: Sequence[int], *, answered: int
    ) -> None:
        self._params, self._eos_ids = params, tokenizer.eos_ids
        self._decoder = tokenizer.stream()
        self._stops = StopMatcher(params.stop)
        self.over: End | None = None
        """The end of an answer that the reader has all of but its end."""
        for number, token in enumerate(before):
            text = self._decoder.push(token)
            if number >= len(before) - answered and not params.min_tokens:
                stop = self._ends(token) or self._stops.push(text)[1]
                self.over = End(reason="stop") if stop else None
        self._chars = self._stops.held  # what is shown with the first token, or after it

    def show(self, position: int, token: int, number: int) -> tuple[Token, End | None]:
        """One more token, the answer's `number`th (from 1), and the end if it is the last."""
        params, offset, end = self._params, self._chars, None
        if number > params.min_tokens and self._ends(token):
            named = token if token in params.stop_token_ids else None
            end = End(reason="stop", stop=named, text=self._stops.flush())
            return Token(position, token, "", offset=offset), end
        text, stop = self._decoder.push(token), None
        self._chars += len(text)
        if number > params.min_tokens:
            text, stop = self._stops.push(text)
        if stop is not None:
            end = End(reason="stop", stop=stop)
        if end is None and number == params.max_tokens:
            end = End(reason="length", text=self._stops.flush())
        return Token(position, token, text, offset=offset), end

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        return self._stops.flush()

    def _ends(self, token: int) -> bool:
        eos = token in self._eos_ids and not self._params.ignore_eos
        return eos or token in self._params.stop_token_ids
