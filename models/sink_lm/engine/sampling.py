"""From logits to the next token, each row of a batch by its own parameters.

The order is that of the OpenAI-compatible servers: logit bias and penalties, temperature, min_p,
top_k, top_p. A draw takes one random number from the answer's own generator, so that what a session
draws does not depend on the sessions that share its batch.

Legend: B rows, V vocabulary, K rows that draw, C likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.sink_lm.engine.sampling_params import SamplingParams

HEAD = 1024
"""Likeliest tokens sorted for top_k and top_p; all tokens are sorted only if these are too few."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, with log probabilities in nats if they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One answer's parameters, random numbers and token counts.

    Its memory is bounded by the vocabulary.

    Args:
        params: how to sample.
        vocab_size: token ids are below it.
        banned: token ids that are not drawn at first; ids outside the vocabulary are ignored.
        banned_for: number of tokens for which they are banned.

    Raises:
        ValueError: `logit_bias` names a token that does not exist.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        *,
        banned: Iterable[int] = (),
        banned_for: int = 0,
    ) -> None:
        self.params = params
        unknown = [token for token in params.logit_bias if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(f"logit_bias: token {unknown[0]} is not below {vocab_size}")
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(params.logit_bias.values()))
        self._penalised = bool(params.presence_penalty or params.frequency_penalty)
        self._counts: dict[int, int] = {}
        self._banned = torch.tensor(sorted(t for t in set(banned) if 0 <= t < vocab_size)).long()
        self._banned_for = banned_for
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**63)

    def uniform(self) -> float:
        """Draws the answer's next random number, in [0, 1)."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    @property
    def is_plain(self) -> bool:
        """Whether the choice is the likeliest token of the untouched logits."""
        ruled = self._penalised or len(self._biased) or self._banned_for
        return self.params.temperature == 0 and not ruled

    def adjust(self, logits_V: Tensor) -> None:
        """Applies bans, bias and penalties in place."""
        if len(self._biased):
            logits_V[self._biased] += self._bias.to(logits_V)
        if self._penalised and self._counts:
            seen = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values())).to(logits_V)
            rules = self.params
            logits_V[seen] -= rules.presence_penalty + rules.frequency_penalty * counts
        if self._banned_for:
            logits_V[self._banned] = -math.inf

    def count(self, token: int) -> None:
        """Counts a token of the answer."""
        self._banned_for = max(0, self._banned_for - 1)
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1


def choose(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """Chooses one token per row.

    Args:
        logits_BV: float [B, V]; not changed.
        samplers: B samplers, which count the chosen tokens.
    """
    if all(sampler.is_plain for sampler in samplers):
        tokens = logits_BV.argmax(-1).tolist()
    else:
        tokens = _choose_by_rules(logits_BV, samplers)
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.count(token)
    return [
        _with_logprobs(logits_V, sampler.params.logprobs, token)
        for logits_V, sampler, token in zip(logits_BV, samplers, tokens, strict=True)
    ]


def _choose_by_rules(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    adjusted_BV = logits_BV.detach().to("cpu", torch.float32, copy=True)
    for logits_V, sampler in zip(adjusted_BV, samplers, strict=True):
        sampler.adjust(logits_V)
    tokens: list[int] = adjusted_BV.argmax(-1).tolist()
    drawing = [row for row, s in enumerate(samplers) if s.params.temperature > 0]
    if drawing:
        probabilities_KV = allowed(adjusted_BV[drawing], [samplers[i].params for i in drawing])
        uniform_K = [samplers[row].uniform() for row in drawing]
        for row, token in zip(drawing, draw(probabilities_KV, uniform_K), strict=True):
            tokens[row] = token
    return tokens


def draw(weights_KV: Tensor, uniform_K: Sequence[float]) -> list[int]:
    """Draws one token per row in proportion to the weights.

    Args:
        weights_KV: float [K, V], not negative.
        uniform_K: K random numbers in [0, 1).
    """
    sums_KV = weights_KV.double().cumsum(-1)
    aim_K1 = torch.tensor(uniform_K, dtype=torch.float64)[:, None] * sums_KV[:, -1:]
    # The first sum above the aim: never a token of weight 0, which adds nothing to the one before.
    drawn_K1 = torch.searchsorted(sums_KV, aim_K1, right=True)
    return drawn_K1.clamp(max=weights_KV.shape[1] - 1).flatten().tolist()


def allowed(logits_KV: Tensor, rules: Sequence[SamplingParams]) -> Tensor:
    """Returns the probabilities after temperature, min_p, top_k and top_p.

    Tokens that are cut get 0; the rest is not renormalised.

    Args:
        logits_KV: float [K, V].
        rules: K parameters, with temperatures above 0.

    Returns:
        float [K, V].
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits_KV.dtype)[:, None]

    # Less the largest, so that no temperature makes an infinity; 1e-30 is as good as zero.
    logits_KV = logits_KV - logits_KV.amax(-1, keepdim=True)
    temperatures_K1 = column([max(rule.temperature, 1e-30) for rule in rules])
    probabilities_KV = torch.softmax(logits_KV / temperatures_K1, dim=-1)
    if any(rule.min_p for rule in rules):
        floor_K1 = column([rule.min_p for rule in rules]) * probabilities_KV.amax(-1, keepdim=True)
        probabilities_KV = probabilities_KV.masked_fill(probabilities_KV < floor_K1, 0)
    ranked = [row for row, rule in enumerate(rules) if rule.top_k or rule.top_p < 1]
    for row in ranked:  # each by itself: who shares the batch must not decide how ties are sorted
        probabilities_KV[row] = _cut(probabilities_KV[row], rules[row])
    return probabilities_KV


def _cut(probabilities_V: Tensor, rule: SamplingParams) -> Tensor:
    """Sets to 0 what top_k and then top_p cut; the likeliest token always stays."""
    vocab = len(probabilities_V)
    top_k = min(rule.top_k or vocab, vocab)
    kept_C, ids_C = probabilities_V.topk(min(HEAD, top_k))
    if len(kept_C) < top_k and kept_C.sum() < rule.top_p * probabilities_V.sum():
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        kept_C, ids_C = sorted_V[:top_k], order_V[:top_k]
    if rule.top_p < 1:
        mass = kept_C.sum() if len(kept_C) == top_k else probabilities_V.sum()
        before_C = kept_C.cumsum(-1, dtype=torch.float64) - kept_C
        before_C[0] = -1
        kept_C = kept_C.masked_fill(before_C >= rule.top_p * mass, 0)
    return torch.zeros_like(probabilities_V).scatter(-1, ids_C, kept_C)


def scored(logits_RV: Tensor, tokens: Sequence[int], count: int | None) -> list[Choice]:
    """Returns given tokens with their log probabilities.

    Args:
        logits_RV: float [R, V]; row r holds the logits after the tokens before token r.
        tokens: R token ids.
        count: likeliest tokens to report.
    """
    rows = zip(logits_RV, tokens, strict=True)
    return [_with_logprobs(logits_V, count, token) for logits_V, token in rows]


def _with_logprobs(logits_V: Tensor, count: int | None, token: int) -> Choice:
    if count is None:
        return Choice(token)
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs_V[token]), top)
