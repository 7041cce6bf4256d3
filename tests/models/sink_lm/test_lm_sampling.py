"""Sampling rules against closed forms, and stop strings across token borders."""

from __future__ import annotations

import math

import pytest
import torch

from models.sink_lm.engine.output_processor import StopMatcher
from models.sink_lm.engine.sampling import Sampler, allowed, choose, draw
from models.sink_lm.engine.sampling_params import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def one(sampling: SamplingParams, logits: torch.Tensor = LOGITS) -> int:
    return choose(logits[None], [Sampler(sampling, len(logits))])[0].token


def frequencies(sampling: SamplingParams, draws: int = 4000) -> torch.Tensor:
    sampler = Sampler(sampling, len(LOGITS))
    found = [choose(LOGITS[None], [sampler])[0].token for _ in range(draws)]
    return torch.bincount(torch.tensor(found), minlength=len(LOGITS)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, 0)
    found = frequencies(SamplingParams(temperature=temperature, seed=1))
    chi2 = (4000 * (found - expected) ** 2 / expected).sum()
    assert chi2 < 20.5  # 4 degrees of freedom, one in 2,500
    wrong = torch.softmax(LOGITS / (temperature * 1.3), 0)
    assert (4000 * (found - wrong) ** 2 / wrong).sum() > 20.5


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.99}, {0, 1, 4}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_top_k_and_top_p_keep_exactly_these_tokens(rules: dict, kept: set[int]) -> None:
    """Probabilities are 0.549, 0.202, 0.074, 0.027, 0.122 + rest."""
    probabilities = allowed(LOGITS[None], [SamplingParams(**rules)])[0]
    assert set(probabilities.nonzero().flatten().tolist()) == kept
    mine = torch.softmax(LOGITS, 0)[sorted(kept)]
    torch.testing.assert_close(probabilities[sorted(kept)], mine)


def reference_nucleus(logits: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    """Token by token: take the likeliest until they are top_k, or sum to top_p of the top_k."""
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))[: top_k or None]
    weights = torch.softmax(logits.double(), 0)[order]
    kept, total = set[int](), 0.0
    for token, weight in zip(order, (weights / weights.sum()).tolist(), strict=True):
        if total >= top_p:
            break
        kept.add(token)
        total += weight
    return kept


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    "rules", [(0, 0.9), (0, 0.3), (5, 0.9), (1500, 1.0), (1500, 0.95), (40, 1.0)]
)
def test_cuts_of_a_large_vocabulary(spread: float, rules: tuple[int, float]) -> None:
    """Nuclei within the sorted head, and far beyond it, beside a row of another kind."""
    torch.manual_seed(0)
    logits, (top_k, top_p) = torch.randn(2, 5000) * spread, rules
    found = allowed(logits, [SamplingParams(top_k=top_k, top_p=top_p), SamplingParams()])
    assert (found[1] > 0).all()
    kept, mine = (
        reference_nucleus(logits[0], top_k, top_p),
        set(found[0].nonzero().flatten().tolist()),
    )
    # Float32 weights may put the border one token further.
    assert len(kept ^ mine) <= 1


def test_draws_use_the_whole_range() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    for uniform, token in [(0.0, 1), (0.2499, 1), (0.2501, 3), (1 - 2**-53, 3)]:
        assert draw(weights, [uniform]) == [token]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert one(SamplingParams(temperature=temperature, seed=0), LOGITS * 100) == 0


def test_rows_keep_their_own_rules_and_noise() -> None:
    """What a row draws does not depend on who shares its batch."""
    rules = [SamplingParams(seed=1), SamplingParams(temperature=0), SamplingParams(seed=2, top_k=3)]
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS * 0.1])
    together = [Sampler(rule, 5) for rule in rules]
    batch = [[c.token for c in choose(logits, together)] for _ in range(20)]
    for row, rule in enumerate(rules):
        alone = Sampler(rule, 5)
        single = [choose(logits[row : row + 1], [alone])[0].token for _ in range(20)]
        assert single == [tokens[row] for tokens in batch]


def test_bias_and_penalties() -> None:
    greedy = {"temperature": 0.0}
    assert one(SamplingParams(**greedy)) == 0
    assert one(SamplingParams(**greedy, logit_bias={3: 100.0})) == 3
    assert one(SamplingParams(**greedy, logit_bias={0: -100.0})) == 1
    sampler = Sampler(SamplingParams(**greedy, frequency_penalty=0.6), 5)
    # 2 - 0.6 n against 1 - 0.6 m, 0.5 - 0.6 l: 0, 0, then ties broken by what is highest.
    assert [choose(LOGITS[None], [sampler])[0].token for _ in range(4)] == [0, 0, 1, 0]
    sampler = Sampler(SamplingParams(**greedy, presence_penalty=1.2), 5)
    assert [choose(LOGITS[None], [sampler])[0].token for _ in range(4)] == [0, 1, 0, 0]


def test_logprobs_are_of_the_untouched_logits() -> None:
    sampling = SamplingParams(temperature=0, logit_bias={3: 100.0}, logprobs=2)
    choice = choose(LOGITS[None], [Sampler(sampling, 5)])[0]
    expected = torch.log_softmax(LOGITS, 0)
    assert choice.token == 3
    assert math.isclose(choice.logprob or 0, float(expected[3]), rel_tol=1e-6)
    assert [token for token, _ in choice.top] == [0, 1]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"min_p": 2},
        {"top_k": -1},
        {"logprobs": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {1: math.nan}},
    ],
)
def test_rules_out_of_range_are_refused_by_name(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_bias_of_an_unknown_token_is_refused() -> None:
    with pytest.raises(ValueError, match="logit_bias: token 9"):
        Sampler(SamplingParams(logit_bias={9: 1.0}), 5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_stop_strings_cross_any_border(size: int) -> None:
    text = "one END? no, EN, and then ENDING it"
    matcher, shown, stop = StopMatcher(["ENDI", "zzz"]), "", None
    for start in range(0, len(text), size):
        part, stop = matcher.push(text[start : start + size])
        shown += part
        assert "ENDI" not in shown
        if stop:
            break
    assert (shown, stop) == ("one END? no, EN, and then ", "ENDI")


def test_nothing_is_lost_without_a_stop() -> None:
    matcher = StopMatcher(["abcabd"])
    shown = "".join(matcher.push(char)[0] for char in "xabcabcab")
    assert shown == "xabc"
    assert shown + matcher.flush() == "xabcabcab"


def test_first_stop_wins_and_empty_ones_are_refused() -> None:
    assert StopMatcher(["cd", "b", "bc"]).push("abcd") == ("a", "bc")
    with pytest.raises(ValueError, match="stop"):
        StopMatcher([""])
