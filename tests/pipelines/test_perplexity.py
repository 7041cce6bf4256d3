"""Attention modes on a text, the perplexity tool and StreamEval."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from helpers.lm.tiny_model import ByteTokenizer, tiny_llama
from models.sink_lm.modes import Mode, recomputed_losses, stream_losses
from pipelines import perplexity as tool
from pipelines.perplexity import PerplexityConfig, perplexity
from pipelines.streameval import Stream, StreamEvalConfig, line, stream_eval

TEXT = torch.randint(256, (120,), generator=torch.Generator().manual_seed(3))


def losses(mode: Mode, chunk: int = 7) -> torch.Tensor:
    return torch.cat(list(stream_losses(tiny_llama(), TEXT, mode, chunk=chunk)))


@pytest.mark.parametrize(
    "mode",
    [
        Mode(name="dense", cache=120),
        Mode(name="window", cache=16),
        Mode(name="sink", cache=16, sinks=4),
    ],
    ids=lambda mode: mode.name,
)
def test_chunks_change_no_loss(mode: Mode) -> None:
    assert len(losses(mode)) == 119
    torch.testing.assert_close(losses(mode), losses(mode, chunk=500))


def test_modes_agree_until_the_cache_is_full_and_not_after() -> None:
    dense = losses(Mode(name="dense", cache=120))
    window, sink = (
        losses(Mode(name="window", cache=16)),
        losses(Mode(name="sink", cache=16, sinks=4)),
    )
    for other in (window, sink):
        torch.testing.assert_close(other[:17], dense[:17])
        assert not torch.allclose(other[17:], dense[17:])
    assert not torch.allclose(window[17:], sink[17:])


def test_recompute_is_dense_attention_over_the_last_tokens() -> None:
    places = torch.tensor([1, 5, 17, 60, 119])
    model = tiny_llama()
    found = torch.stack(list(recomputed_losses(model, TEXT, places, cache=16)))
    for place, loss in zip(places.tolist(), found, strict=True):
        read = TEXT[max(0, place - 17) : place + 1]
        alone = Mode(name="dense", cache=len(read))
        torch.testing.assert_close(next(stream_losses(model, read, alone))[-1], loss)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"sinks": "4,x"}, "--sinks"),
        ({"sinks": "-1"}, "--sinks"),
        ({"cache": ""}, "--cache"),
        ({"cache": "1"}, "--cache"),
        ({"sinks": "8", "cache": "8"}, "--sinks"),
        ({"max_tokens": 256}, "--max-tokens"),
    ],
)
def test_flags_at_fault_are_named(changes: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        PerplexityConfig(model="m", text=Path("t"), **changes)


def test_the_tool_writes_rows_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "models.sink_lm.checkpoints.loading.load_model", lambda path, *, dtype, device: tiny_llama()
    )
    monkeypatch.setattr(
        "models.sink_lm.checkpoints.tokenizer.load_tokenizer", lambda path: ByteTokenizer()
    )
    text = tmp_path / "text.txt"
    text.write_text("it was the best of times, it was the worst of times; " * 4)
    cfg = PerplexityConfig(
        model="tiny",
        text=text,
        sinks="0,2",
        cache="8,16",
        max_tokens=200,
        dense=True,
        recompute_samples=5,
        json=tmp_path / "out" / "rows.json",
    )
    rows = perplexity(cfg)
    assert [row.mode for row in rows] == ["dense", *["window", "sink", "recompute"] * 2]
    assert all(math.isfinite(row.perplexity) and row.decode_tokens_per_s > 0 for row in rows)
    report = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert report["tokens"] == 200
    assert report["rows"][1]["cache_mib"] == 2 * 2 * 2 * 9 * 8 * 8 / 2**20
    assert (tmp_path / "out" / "rows.png").stat().st_size > 10_000


def test_a_text_shorter_than_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "models.sink_lm.checkpoints.tokenizer.load_tokenizer", lambda path: ByteTokenizer()
    )
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(ValueError, match="5 tokens"):
        tool.perplexity(PerplexityConfig(model="tiny", text=text))


EVAL = StreamEvalConfig(model="tiny", cache=200, distances="1,20", lines=60)


def test_stream_eval_counts_what_is_right_and_what_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answerer that knows every line above a bar stands in for a model that can read."""
    heard: dict[str, str] = {}
    read, ask = Stream.read, Stream.ask

    def listen(self: Stream, text: str) -> None:
        heard[text[: text.index("<") + 1]] = text[text.index("<") + 1 :]
        read(self, text)

    def answer(self: Stream, text: str, count: int) -> tuple[str, int]:
        _, asked = ask(self, text, count)
        number = int(text.split("line ")[1].split(" ")[0])
        return (heard[text] if number >= 29 else "0000>"), asked

    monkeypatch.setattr(Stream, "read", listen)
    monkeypatch.setattr(Stream, "ask", answer)
    near, far = stream_eval(EVAL, tiny_llama(max_positions=4096), ByteTokenizer())
    # Asked after lines 9, 19, ... 59: one back is lines 8, 18, ... 58, twenty back 9, ... 39.
    assert (near.asked, near.right, near.in_cache) == (6, 3, True)
    assert (far.asked, far.right, far.in_cache) == (4, 2, False)


def test_a_question_leaves_the_stream_as_it_was() -> None:
    stream = Stream(tiny_llama(), ByteTokenizer(), EVAL)
    stream.read(line(0) + "1234>")
    position = stream.position
    first = stream.ask(line(0), 5)
    assert stream.ask(line(0), 5) == first
    assert stream.position == position


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"distances": "500"}, "--lines"),
        ({"distances": "0"}, "--distances"),
        ({"sinks": 600}, "--sinks"),
    ],
)
def test_stream_eval_flags_at_fault_are_named(changes: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        StreamEvalConfig(model="m", **changes)
