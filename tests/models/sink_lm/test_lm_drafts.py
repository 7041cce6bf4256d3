"""Guesses change the speed of a stream, and nothing else."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from helpers.lm.engine import alone, ask, ids, make, run
from helpers.lm.tiny_model import tiny_llama
from models.sink_lm.engine import drafts
from models.sink_lm.engine.drafts import Drafter
from models.sink_lm.engine.engine import Engine


def parrot(drafter: Drafter, tokens: list[int]) -> list[int]:
    drafter.push(tokens)
    return drafter.draft()


def test_a_guess_is_what_came_after_the_same_tokens() -> None:
    drafter = Drafter(8)
    assert parrot(drafter, [1, 2, 3, 4, 5]) == []
    assert parrot(drafter, [9, 1, 2, 3]) == [4, 5]
    drafter.learn(2, 2)
    assert drafter.draft() == [4, 5, 9, 1]
    drafter.learn(4, 1)
    assert drafter.draft() == [4]
    assert parrot(Drafter(5), [7] * 5) == [7, 7]


def test_guesses_pause_while_they_do_not_come_true() -> None:
    drafter = Drafter(4)
    drafter.push([7] * 5)
    pauses = []
    for _ in range(4):
        pauses.append(0)
        while not drafter.draft():
            pauses[-1] += 1
        drafter.learn(1, 0)
    assert pauses == [0, 1, 3, 7]


def test_a_drafter_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "HISTORY", 10)
    drafter = Drafter(3)
    drafter.push([1, 2, 3, 4])
    for start in range(100, 1100):
        drafter.push([start])
        assert len(drafter._tokens) <= 20
        assert len(drafter._ends) <= 20
    assert parrot(drafter, [1, 2, 3]) == []


def counted(engine: Engine) -> list[int]:
    """Notes the tokens of every pass over guesses."""
    sizes: list[int] = []
    look_ahead = engine.model.look_ahead

    def count(tokens_T, slabs, slot):  # type: ignore[no-untyped-def]
        sizes.append(len(tokens_T))
        return look_ahead(tokens_T, slabs, slot)

    engine.model.look_ahead = count  # type: ignore[method-assign]
    return sizes


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("prompt", [b"abcabcabcabc", b"no word comes twice", b"x" * 60])
def test_greedy_tokens_are_those_of_single_steps(prompt: bytes, sinks: int) -> None:
    """Far over the cache's border: a guess that fails must not have overwritten anything."""
    engine = make(draft_tokens=6, max_buffered=1000)
    sizes = counted(engine)
    engine.open("a", sinks=sinks)
    events = run(engine, engine.submit("a", list(prompt), ask(150)))[0]
    assert ids(events) == alone(prompt, 150, sinks)
    assert [event.position for event in events[:-1]] == list(
        range(len(prompt) + 1, len(prompt) + 151)
    )
    assert engine.info("a").position == len(prompt) + 150
    assert sizes or prompt.startswith(b"no")
    again = ids(run(engine, engine.submit("a", list(b"more"), ask(20)))[0])
    assert again == alone([*prompt, *ids(events), *b"more"], 20, sinks)


@pytest.mark.parametrize("sinks", [0, 4])
def test_guesses_that_fail_half_way_do_no_harm(sinks: int) -> None:
    """0 to 4 right tokens, then wrong ones, at every place of the ring."""
    expected = alone(b"some prompt", 150, sinks)
    engine = make(draft_tokens=6, max_buffered=1000)
    sizes = counted(engine)
    engine.open("a", sinks=sinks)
    session, rounds = engine._sessions["a"], itertools.count()

    def draft() -> list[int]:
        place, right = engine.info("a").position - len(b"some prompt"), next(rounds) % 5
        return [*expected[place : place + right], 1, 2]

    session.drafter.draft = draft  # type: ignore[method-assign,union-attr]
    assert ids(run(engine, engine.submit("a", list(b"some prompt"), ask(150)))[0]) == expected
    assert 40 < len(sizes) < 80  # three tokens a pass


def test_guesses_take_fewer_passes() -> None:
    plain, drafting = make(), make(draft_tokens=6)
    passes = {}
    for name, engine in (("plain", plain), ("drafting", drafting)):
        engine.open("a")
        generation = engine.submit("a", list(b"abcabcabc"), ask(200, logit_bias={120: 1000.0}))
        count = 0
        while not generation.done:
            engine.tick()
            generation.take()
            count += 1
        passes[name] = count
    assert passes["plain"] > 200
    assert passes["drafting"] < 200 / 5  # seven tokens a pass, once they have come true


def test_sampled_tokens_follow_the_same_random_numbers() -> None:
    """Each token is drawn from the logits after the ones before it, guessed or not."""
    rules = ask(80, temperature=0.7, seed=5, frequency_penalty=0.1, top_p=0.9, logprobs=2)
    found = []
    for draft_tokens in (0, 5):
        engine = make(draft_tokens=draft_tokens, max_buffered=1000)
        sizes = counted(engine)
        engine.open("a")
        found.append(run(engine, engine.submit("a", list(b"abcabcabc abc"), rules))[0])
    assert sizes
    assert ids(found[0]) == ids(found[1])
    for one, other in zip(found[0][:-1], found[1][:-1], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_an_answer_ends_and_pauses_within_a_guess() -> None:
    engine = make(draft_tokens=8, max_buffered=3)
    engine.open("a")
    generation = engine.submit("a", list(b"x" * 20), ask(40))
    seen = []
    while not generation.done:
        engine.tick()
        taken = generation.take()
        assert len(taken) <= 3 + 1  # the end comes with the last token
        seen += taken
    assert ids(seen) == alone(b"x" * 20, 40)
    assert engine.info("a").position == 60


def test_several_sessions_are_not_guessed_for() -> None:
    engine = make(draft_tokens=6, max_buffered=1000)
    sizes = counted(engine)
    generations = []
    for name, count in (("a", 30), ("b", 60)):
        engine.open(name)
        rules = ask(count, logit_bias={120: 1000.0})
        generations.append(engine.submit(name, list(b"x" * 20), rules))
    while not generations[0].ended:
        engine.tick()
    assert not sizes
    run(engine, *generations)
    assert sizes  # the other one is alone now


def test_rejected_guesses_leave_the_slab_as_it_was() -> None:
    """The negative control: written at once, the chunk would change what the next step sees."""
    model = tiny_llama()
    slabs = model.slabs(sessions=1, capacity=24)
    slot = slabs.allocate(4)
    model.prefill(torch.arange(60), slabs, slot, logits="none")
    before = slabs.export(slot)
    logits_TV, rows = model.look_ahead(torch.arange(60, 65), slabs, slot)
    assert all(torch.equal(before[key], value) for key, value in slabs.export(slot).items())
    rows.keep()
    state = slabs.export(slot)
    changed = Counter((state["keys"] != before["keys"]).any(-1).nonzero()[:, 2].tolist())
    assert len(changed) == 1
    other = model.slabs(sessions=1, capacity=24)
    other.restore(other.allocate(4), before)
    expected = model.decode(torch.tensor([60]), other, [0])[0]
    torch.testing.assert_close(logits_TV[0], expected, atol=1e-5, rtol=1e-5)
    for key, value in other.export(0).items():
        torch.testing.assert_close(value, state[key], atol=1e-5, rtol=1e-5)
