"""How one answer is generated: the one list of parameters from an HTTP body to the sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The parameters of one answer, under the names they have in the HTTP API.

    The ingress makes one of every request; replica, engine and sampler read this very object. It
    needs neither torch nor a model.
    """

    max_tokens: int | None = None
    """End after this many tokens. None goes on until cancelled; 0 only reads the prompt, all but
    its last token."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Go on after the model's end token."""
    min_tokens: int = 0
    """Draw no end token and look for no stop string in this many first tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this; the likeliest at least."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 from all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    seed: int | None = None
    """Makes the draws repeatable; None draws afresh."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token this answer already has."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time this answer has the token."""
    logprobs: int | None = None
    """Report this many likeliest tokens, from the untouched logits; None reports none."""
    prompt_logprobs: int | None = None
    """Report the tokens of the prompt first, each with this many likeliest ones; None does not."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: names the field.
        """
        for name in ("temperature", "presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if not all(map(math.isfinite, self.logit_bias.values())):
            raise ValueError("logit_bias must be finite")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("temperature", "top_k", "min_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("max_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")

    def after(self, tokens: int) -> SamplingParams:
        """Returns the parameters of the rest of an answer that has `tokens` tokens already."""
        limit = self.max_tokens
        return replace(
            self,
            max_tokens=None if limit is None else limit - tokens,
            min_tokens=max(0, self.min_tokens - tokens),
        )
