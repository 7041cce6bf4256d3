"""From logits to the next token, each row of a batch by its own rules.

Order, as the OpenAI-compatible servers have it: logit bias and penalties, temperature, min_p, top_k,
top_p. Noise comes from a generator of each answer, so what a session draws does not depend on who
shares its batch.

Legend: B rows, V vocabulary, K rows that draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one answer chooses its tokens."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 from all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    seed: int | None = None
    """Makes the draws repeatable; None draws afresh."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token this answer already has."""
    frequency_penalty: float = 0.0
    """Taken off once for every time this answer has it."""
    logprobs: int | None = None
    """Report this many likeliest tokens, from the untouched logits; None reports none."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: names the field.
        """
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be at least 0, got {self.logprobs}")


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token, with log probabilities in nats where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One answer's rules with what they remember; memory is bounded by the vocabulary.

    Args:
        sampling: the rules.
        vocab_size: token ids are below it.

    Raises:
        ValueError: `logit_bias` names a token there is not.
    """

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.sampling = sampling
        unknown = [token for token in sampling.logit_bias if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(f"logit_bias: token {unknown[0]} is not below {vocab_size}")
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(sampling.logit_bias.values()))
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._counts: dict[int, int] = {}
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed % 2**63)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the untouched logits is the choice."""
        return self.sampling.temperature == 0 and not self._penalised and not len(self._biased)

    def adjust(self, logits_V: Tensor) -> None:
        """Applies bias and penalties in place."""
        if len(self._biased):
            logits_V[self._biased] += self._bias.to(logits_V)
        if self._penalised and self._counts:
            seen = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values())).to(logits_V)
            rules = self.sampling
            logits_V[seen] -= rules.presence_penalty + rules.frequency_penalty * counts

    def count(self, token: int) -> None:
        """Remembers a token of the answer."""
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1


def choose(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """Chooses one token a row.

    Args:
        logits_BV: float [B, V]; left as they are.
        samplers: B; they count the choice.
    """
    if all(sampler.is_plain for sampler in samplers):
        tokens = logits_BV.argmax(-1).tolist()
    else:
        tokens = _choose_by_rules(logits_BV, samplers)
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.count(token)
    return [
        _with_logprobs(logits_V, sampler.sampling.logprobs, token)
        for logits_V, sampler, token in zip(logits_BV, samplers, tokens, strict=True)
    ]


def _choose_by_rules(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    adjusted_BV = logits_BV.detach().to("cpu", torch.float32, copy=True)
    for logits_V, sampler in zip(adjusted_BV, samplers, strict=True):
        sampler.adjust(logits_V)
    tokens: list[int] = adjusted_BV.argmax(-1).tolist()
    drawing = [row for row, s in enumerate(samplers) if s.sampling.temperature > 0]
    if drawing:
        probabilities_KV = allowed(adjusted_BV[drawing], [samplers[i].sampling for i in drawing])
        noise_KV = torch.empty_like(probabilities_KV)
        for noise_V, row in zip(noise_KV, drawing, strict=True):
            noise_V.exponential_(generator=samplers[row].generator)
        # The smallest of independent exponential times with these rates: a draw without a sum.
        drawn = (probabilities_KV / noise_KV).argmax(-1).tolist()
        for row, token in zip(drawing, drawn, strict=True):
            tokens[row] = token
    return tokens


def allowed(logits_KV: Tensor, rules: Sequence[Sampling]) -> Tensor:
    """Probabilities after temperature, min_p, top_k and top_p, zero where cut, not renormalised.

    Args:
        logits_KV: float [K, V].
        rules: K, of temperature above 0.

    Returns:
        float [K, V].
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits_KV.dtype)[:, None]

    vocab = logits_KV.shape[1]
    probabilities_KV = torch.softmax(logits_KV / column([r.temperature for r in rules]), dim=-1)
    floor = column([r.min_p for r in rules]) * probabilities_KV.amax(-1, keepdim=True)
    probabilities_KV = probabilities_KV.masked_fill(probabilities_KV < floor, 0)
    if all(not rule.top_k and rule.top_p == 1 for rule in rules):
        return probabilities_KV
    sorted_KV, order_KV = probabilities_KV.sort(stable=True, dim=-1, descending=True)
    rank_V = torch.arange(vocab)
    cut_KV = rank_V >= column([rule.top_k or vocab for rule in rules])
    kept_KV = sorted_KV.masked_fill(cut_KV, 0)
    kept_KV = kept_KV / kept_KV.sum(-1, keepdim=True)
    before_KV = kept_KV.cumsum(-1) - kept_KV
    # The likeliest always stays: nothing comes before it.
    cut_KV |= (before_KV >= column([rule.top_p for rule in rules])) & (rank_V > 0)
    return torch.zeros_like(sorted_KV).scatter(-1, order_KV, sorted_KV.masked_fill(cut_KV, 0))


def _with_logprobs(logits_V: Tensor, count: int | None, token: int) -> Choice:
    if count is None:
        return Choice(token)
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs_V[token]), top)
