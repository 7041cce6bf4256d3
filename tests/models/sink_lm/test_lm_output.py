"""Where an answer ends, including answers that began in an earlier request."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.lm.tiny_model import EOS, ByteTokenizer
from models.sink_lm.engine.output import End
from models.sink_lm.engine.output_processor import OutputProcessor
from models.sink_lm.engine.sampling import Choice
from models.sink_lm.engine.sampling_params import SamplingParams


def processor(*, keeps_partial: bool = True, **params: Any) -> OutputProcessor:
    tokenizer: Any = ByteTokenizer()
    return OutputProcessor(SamplingParams(**params), tokenizer, keeps_partial=keeps_partial)


def push(output: OutputProcessor, text: bytes) -> str:
    return "".join(output.push(Choice(byte), n + 1).text for n, byte in enumerate(text))


@pytest.mark.parametrize(("keeps_partial", "rest"), [(True, ""), (False, "\ufffd")])
def test_an_incomplete_character_at_the_end_is_left_to_a_later_request(
    keeps_partial: bool, rest: str
) -> None:
    output = processor(keeps_partial=keeps_partial, max_tokens=2)
    assert push(output, "aé".encode()[:2]) == "a"
    assert output.end == End(reason="length", text=rest)


def test_a_stop_string_and_a_character_cross_the_border_between_requests() -> None:
    output = processor(stop=("xéz",))
    before = "pxé".encode()
    assert output.resume(before[:-1], answered=2) is None
    shown = output.push(Choice(before[-1]), 4)
    assert (shown.text, shown.offset, output.end) == ("", 1, None)  # the "x" was held back before
    assert push(output, b"z") == ""
    assert output.end == End(reason="stop", stop="xéz")


def test_a_stop_string_cannot_begin_before_the_answer() -> None:
    output = processor(stop=("ab",), max_tokens=2)
    assert output.resume(b"a", answered=0) is None
    assert push(output, b"bc") == "bc"
    assert output.end == End(reason="length")


def test_a_reader_that_has_every_token_gets_the_finish_reason() -> None:
    assert processor(stop=("bc",)).resume(b"abc", answered=3) == End(reason="stop")
    assert processor().resume([97, EOS], answered=2) == End(reason="stop")
    assert processor(ignore_eos=True).resume([97, EOS], answered=2) is None
    assert processor(stop=("bc",), min_tokens=1).resume(b"abc", answered=3) is None


def test_replayed_tokens_count_towards_min_and_max_tokens() -> None:
    output = processor(min_tokens=3, max_tokens=5, stop=("b",))
    assert push(output, b"ab") == "ab"
    assert output.min_left == 1
    assert push(output, b"cbd"[:1]) == "c"
    assert output.min_left == 0
    assert push(output, b"b") == ""
    assert output.end == End(reason="stop", stop="b")


def test_cancelling_releases_text_that_was_held_back() -> None:
    output = processor(stop=("bcd",))
    assert push(output, b"abc") == "a"
    assert output.finish("cancelled") == End(reason="cancelled", text="bc")
