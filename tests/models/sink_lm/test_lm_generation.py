"""What the engine writes: text, stop strings, seeds, how an answer ends."""

from __future__ import annotations

import pytest

from helpers.lm.engine import ask, ids, make, run
from helpers.lm.tiny_model import EOS, scripted_llama
from models.sink_lm.engine.output import End
from models.sink_lm.engine.sampling_params import SamplingParams


def test_text_ends_at_a_stop_string_across_tokens_and_at_the_end_token() -> None:
    engine = make(scripted_llama("abcdefg"))
    engine.open("a")
    events = run(engine, engine.submit("a", list(b"a"), ask(None, stop=("def",))))[0]
    assert "".join(event.text for event in events) == "bc"
    assert events[-1] == End(reason="stop", stop="def")
    assert len(ids(events)) == 5
    engine.open("b")
    events = run(engine, engine.submit("b", list(b"a"), ask(None, ignore_eos=False)))[0]
    assert "".join(event.text for event in events) == "bcdefg"
    assert events[-1] == End(reason="stop", stop=None)
    assert len(ids(events)) == 7
    assert events[-2].token == EOS


def test_held_back_text_comes_out_at_the_end() -> None:
    engine = make(scripted_llama("abcdefg"))
    engine.open("a")
    events = run(engine, engine.submit("a", list(b"a"), ask(4, stop=("exx",))))[0]
    assert [event.text for event in events] == ["b", "c", "d", "", "e"]


def test_characters_come_whole() -> None:
    engine = make(scripted_llama("aé☃"))
    engine.open("a")
    events = run(engine, engine.submit("a", list(b"a"), ask(None, ignore_eos=False)))[0]
    assert [event.text for event in events[:5]] == ["", "é", "", "", "☃"]


def test_an_answer_that_ends_inside_a_character_says_so() -> None:
    engine = make(scripted_llama("aé☃"))
    for count, text in ((1, "\ufffd"), (2, "é"), (4, "é\ufffd"), (5, "é☃")):
        engine.open(f"{count}")
        events = run(engine, engine.submit(f"{count}", list(b"a"), ask(count)))[0]
        assert "".join(event.text for event in events) == text
        engine.close(f"{count}")


def test_seeds_repeat_whoever_shares_the_batch() -> None:
    def tokens(others: int) -> list[int]:
        engine = make()
        params = ask(20, seed=7, temperature=1.5)
        for number in range(others):
            engine.open(f"o{number}")
            engine.submit(f"o{number}", list(b"other"), ask(30, seed=number, temperature=1.0))
        engine.open("me")
        return ids(run(engine, engine.submit("me", list(b"me"), params))[0])

    assert tokens(0) == tokens(3)


def test_nothing_ends_an_answer_before_min_tokens() -> None:
    engine = make(scripted_llama("abcdefg"))
    engine.open("a")
    rules = ask(20, stop=("b", "fg"), min_tokens=4, ignore_eos=False)
    events = run(engine, engine.submit("a", list(b"a"), rules))[0]
    assert "".join(event.text for event in events) == "bcde"
    assert events[-1] == End(reason="stop", stop="fg")
    assert len(ids(events)) == 6
    engine.open("edge")  # the one that ends with the last token that must come does not count
    rules = ask(20, stop=("e", "f"), min_tokens=4)
    events = run(engine, engine.submit("edge", list(b"a"), rules))[0]
    assert "".join(event.text for event in events) == "bcde"
    assert events[-1] == End(reason="stop", stop="f")
    assert len(ids(events)) == 5
    engine.open("b")
    rules = ask(7, min_tokens=3, ignore_eos=False, stop_token_ids=(ord("g"), 99_999))
    found = ids(run(engine, engine.submit("b", list(b"e"), rules))[0])
    assert found[0] == ord("f")
    assert not {ord("g"), EOS} & set(found[:3])
    assert len(found) > 3


@pytest.mark.parametrize("bad", [{"prompt_logprobs": -1}, {"max_tokens": -1}, {"min_tokens": -1}])
def test_requests_out_of_range_are_refused_by_name(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
