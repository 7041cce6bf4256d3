"""The engine: batching changes nothing, sessions are independent, nothing grows."""

from __future__ import annotations

import threading
import time

import pytest

from helpers.lm.engine import alone, ask, ids, make, run
from helpers.lm.tiny_model import held_bytes
from models.sink_lm.engine.output import End
from models.sink_lm.engine.session import SessionBusy, SessionExists, UnknownSession
from models.sink_lm.network.cache import NoFreeSlab


@pytest.mark.parametrize("by_bucket", [False, True])
def test_sessions_in_a_batch_answer_as_each_does_alone(by_bucket: bool) -> None:
    """Prompts shorter and longer than the cache, in chunks, joined at different times."""
    engine = make(by_bucket=by_bucket)
    prompts = [b"a", b"hello there", b"x" * 23 + b"yz", bytes(range(100))]
    generations = []
    for number, prompt in enumerate(prompts):
        engine.open(f"s{number}")
        generations.append(engine.submit(f"s{number}", list(prompt), ask(30)))
        engine.tick()
    for prompt, events in zip(prompts, run(engine, *generations), strict=True):
        assert ids(events) == alone(prompt, 30)
        assert events[-1] == End(reason="length", text=events[-1].text)
        assert len(ids(events)) == 30
    assert engine.info("s3").position == 130
    assert engine.info("s3").evicted_tokens == 130 - 23


def test_two_turns_equal_one_long_prompt() -> None:
    """The last token of a turn is read before the next prompt: nothing is missing."""
    engine = make()
    engine.open("a")
    first = ids(run(engine, engine.submit("a", list(b"first"), ask(9)))[0])
    second = ids(run(engine, engine.submit("a", list(b"second"), ask(9)))[0])
    assert second == alone([*b"first", *first, *b"second"], 9)
    more = ids(run(engine, engine.submit("a", [], ask(5)))[0])
    assert more == alone([*b"first", *first, *b"second", *second], 5)


def test_tokens_are_in_the_journal_before_the_reader_gets_them() -> None:
    log: list[int] = []
    engine = make(journal=lambda name, tokens: log.extend(tokens))
    engine.open("a")
    generation = engine.submit("a", list(b"prompt"), ask(5))
    assert log == list(b"prompt")
    seen: list[int] = []
    generation.notify = lambda: seen.append(len(log))
    events = run(engine, generation)[0]
    assert log == [*b"prompt", *ids(events)]
    assert seen[:5] == [7, 8, 9, 10, 11]


def test_snapshot_and_tail_go_on_as_if_nothing_happened() -> None:
    log: list[int] = []
    engine = make(journal=lambda name, tokens: log.extend(tokens))
    engine.open("a", sinks=2)
    generation = engine.submit("a", list(b"a long enough prompt to evict something"), ask(40))
    for _ in range(15):
        engine.tick()
    state = engine.export("a")
    kept = int(state["length"]) + len(state["pending"])
    run(engine, generation)
    written, expected = list(log), ids(run(engine, engine.submit("a", [], ask(20)))[0])
    other = make()
    other.restore("b", state, written[kept:])
    assert other.info("b").position == len(written)
    assert ids(run(other, other.submit("b", [], ask(20)))[0]) == expected


def test_a_fork_answers_like_its_source_and_is_independent() -> None:
    engine = make()
    engine.open("a")
    run(engine, engine.submit("a", list(b"shared prompt, longer than the cache is"), ask(7)))
    engine.fork("a", "b")
    a, b = run(engine, engine.submit("a", [], ask(9)), engine.submit("b", [], ask(9)))
    assert ids(a) == ids(b)
    run(engine, engine.submit("a", list(b"only a"), ask(3)))
    assert engine.info("a").position == engine.info("b").position + 9


def test_extend_reads_without_an_answer() -> None:
    engine = make()
    engine.open("a")
    engine.extend("a", list(b"a prompt that is read before it is forke"))
    engine.fork("a", "b")
    rest = [engine.submit(name, list(b"d"), ask(6)) for name in "ab"]
    expected = alone(b"a prompt that is read before it is forked", 6)
    assert [ids(events) for events in run(engine, *rest)] == [expected, expected]
    with pytest.raises(ValueError, match="token 300"):
        engine.extend("a", [300])


def test_a_slow_reader_pauses_only_itself() -> None:
    engine = make(max_buffered=6)
    for name in "ab":
        engine.open(name)
    slow = engine.submit("a", list(b"aa"), ask(None))
    fast = engine.submit("b", list(b"bb"), ask(50))
    events = run(engine, fast)[0]
    assert len(ids(events)) == 50
    assert engine.info("a").position == 2 + 6
    assert len(slow.take(4)) == 4
    for _ in range(20):
        engine.tick()
    assert engine.info("a").position == 2 + 10


def test_cancel_leaves_the_session() -> None:
    engine = make()
    engine.open("a")
    generation = engine.submit("a", list(b"prompt"), ask(None))
    with pytest.raises(SessionBusy):
        engine.submit("a", [1], ask())
    with pytest.raises(SessionBusy):
        engine.fork("a", "b")
    for _ in range(8):
        engine.tick()
    generation.cancel()
    events = run(engine, generation)[0]
    assert events[-1].reason == "cancelled"
    assert not engine.tick()
    rest = ids(run(engine, engine.submit("a", [], ask(5)))[0])
    assert rest == alone(b"prompt", len(ids(events)) + 5)[-5:]


def test_cancel_in_the_middle_of_a_prompt_loses_nothing_of_it() -> None:
    engine = make()
    engine.open("a")
    prompt = b"a prompt of several chunks that is cancelled in between"
    generation = engine.submit("a", list(prompt), ask())
    engine.tick()
    generation.cancel()
    engine.tick()
    assert ids(run(engine, engine.submit("a", [], ask(5)))[0]) == alone(prompt, 5)


def test_numbers_of_slabs_and_names_are_limited() -> None:
    engine = make(sessions=2)
    engine.open("a")
    engine.open("b")
    with pytest.raises(SessionExists):
        engine.open("b")
    with pytest.raises(NoFreeSlab):
        engine.open("c")
    generation = engine.submit("a", [1], ask(None))
    engine.tick()
    engine.close("a")
    assert generation.take()[-1].reason == "cancelled"
    with pytest.raises(UnknownSession):
        engine.submit("a", [1], ask())
    engine.open("c")
    assert engine.sessions() == ["b", "c"]


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        ([300], {}, "token 300"),
        ([-1], {}, "token -1"),
        ([], {}, "empty prompt"),
        ([1], {"logit_bias": {999: 1.0}}, "logit_bias: token 999"),
    ],
)
def test_a_refused_request_leaves_no_trace(
    tokens: list[int], changes: dict[str, object], message: str
) -> None:
    log: list[int] = []
    engine = make(journal=lambda name, new: log.extend(new))
    engine.open("a")
    with pytest.raises(ValueError, match=message):
        engine.submit("a", tokens, ask(**changes))
    assert (engine.info("a").position, engine.info("a").busy, log) == (0, False, [])


@pytest.mark.parametrize("bad", ["prefill_chunk", "max_buffered"])
def test_sizes_that_would_make_no_progress_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=bad):
        make(**{bad: 0})


def test_a_journal_that_fails_ends_one_answer_and_shows_nothing_unwritten() -> None:
    log: dict[str, list[int]] = {name: [] for name in ("one", "two", "three")}

    def journal(name: str, tokens: list[int]) -> None:
        if name == "two" and len(log["two"]) == 8:
            raise OSError("disk full")
        log[name] += tokens

    engine = make(journal=journal)
    generations = []
    for name in log:
        engine.open(name)
        generations.append(engine.submit(name, list(b"hello"), ask(10)))
    one, two, three = run(engine, *generations)
    assert ids(one) == ids(three) == alone(b"hello", 10)
    assert ids(two) == log["two"][5:] == alone(b"hello", 3)
    assert (two[-1].reason, two[-1].message) == ("error", "OSError: disk full")
    assert engine.info("two").position == 8
    log["two"].pop()  # the disk has room again
    more = ids(run(engine, engine.submit("two", list(b"more"), ask(4)))[0])
    assert more == alone(b"hello" + bytes(ids(two)) + b"more", 4)


def test_a_reader_whose_callback_fails_is_dropped() -> None:
    def notify() -> None:
        raise RuntimeError("Event loop is closed")

    engine = make()
    engine.open("a")
    engine.open("b")
    gone, here = engine.submit("a", [1], ask(None)), engine.submit("b", [1], ask(9))
    gone.notify = notify
    assert len(ids(run(engine, here)[0])) == 9
    assert gone.take()[-1].reason == "cancelled"
    assert not engine.info("a").busy


def test_a_damaged_state_takes_no_slab() -> None:
    engine, other = make(), make(sessions=1)
    engine.open("a")
    run(engine, engine.submit("a", list(b"prompt"), ask(3)))
    state = engine.export("a")
    for name in state:
        with pytest.raises(ValueError, match=name):
            other.restore("b", {key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="keys"):
        other.restore("b", state | {"keys": state["keys"].half()})
    with pytest.raises(ValueError, match="token 999"):
        other.restore("b", state, [999])
    assert (other.slabs.free, other.sessions()) == (1, [])


def test_short_prompts_share_a_chunk_and_a_long_one_takes_turns() -> None:
    engine = make(prefill_chunk=8, sessions=5)
    prompts = [b"x" * 30, b"abc", b"defg", b"hijkl", b"mno"]
    generations = []
    for number, prompt in enumerate(prompts):
        engine.open(f"s{number}")
        generations.append(engine.submit(f"s{number}", list(prompt), ask(9)))
    read = []
    for _ in range(4):
        engine.tick()
        read.append([min(engine.slabs.length(slot), 30) for slot in range(5)])
    # All but the last token of a prompt are read in chunks of 8; the last is decoded.
    assert read[0] == [8, 0, 0, 0, 0]
    assert read[1][0] == 8
    assert read[1][1:] == [2 + 1, 3 + 1, 3, 0]  # the chunk ends within the fourth prompt
    assert [read[2][0], *read[2][3:]] == [8 + 6, 3, 2 + 1]
    assert [read[3][0], read[3][3]] == [14 + 7, 4 + 1]
    for prompt, events in zip(prompts, run(engine, *generations), strict=True):
        assert ids(events) == alone(prompt, 9)


def test_pinned_prefixes_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, read = make(prefill_chunk=64, capacity=32), []
    model_read = engine.model.read_packed

    def counted(prompts, slabs, slots):  # type: ignore[no-untyped-def]
        read.append([len(prompt) for prompt in prompts])
        return model_read(prompts, slabs, slots)

    monkeypatch.setattr(engine.model, "read_packed", counted)
    system = b"you are a parrot"
    prompts = {"a": system + b" one", "b": system + b" two", "c": b"you are not a", "d": system}
    found = {}
    for name, prompt in prompts.items():
        engine.open(name, sinks=len(system) if name != "d" else 4)
        found[name] = ids(run(engine, engine.submit(name, list(prompt), ask(40)))[0])
    # 19 of 20 tokens; 3 after 16 shared; "you are " shared, 4 of 5 left; 4 sinks shared, 11 of 12.
    assert read == [[19], [3], [4], [11]]
    for name, prompt in prompts.items():
        sinks = len(system) if name != "d" else 4
        assert found[name] == alone(prompt, 40, sinks, capacity=32)


def test_prefixes_are_not_shared_where_logits_are_asked_for_or_tokens_are_unknown() -> None:
    engine = make(sessions=4, capacity=32)
    engine.open("a", sinks=8)
    run(engine, engine.submit("a", list(b"pinned, and more"), ask(3)))
    engine.open("b", sinks=8)
    rules = ask(3, prompt_logprobs=1)
    run(engine, generation := engine.submit("b", list(b"pinned, and more"), rules))
    assert generation.ended
    engine.restore("c", engine.export("a"))
    engine.close("a")
    engine.close("b")
    engine.open("d", sinks=8)
    engine.submit("d", list(b"pinned, and more"), ask(3))
    engine.tick()
    assert engine.slabs.length(engine._sessions["d"].slot) == 5  # one chunk, nothing copied


def test_a_restored_tail_is_read_before_the_first_request() -> None:
    engine = make()
    engine.open("a")
    engine.restore("b", engine.export("a"), list(b"a tail of several chunks"))
    while engine.tick():
        pass
    assert engine.slabs.length(1) == 23
    assert engine.info("b").position == 24
    found = ids(run(engine, engine.submit("b", [], ask(5)))[0])
    assert found == alone(b"a tail of several chunks", 5)


def test_callers_get_a_turn_during_a_busy_loop_of_ticks() -> None:
    """Without the second lock a caller waits for dozens of ticks, now and then for hundreds."""
    engine, seen, stop = make(), [0], threading.Event()
    decode = engine.model.decode

    def slow(*args: object) -> object:
        seen[0] += 1
        time.sleep(0.005)
        return decode(*args)  # type: ignore[arg-type]

    engine.model.decode = slow  # type: ignore[assignment,method-assign]
    engine.open("a")
    generation = engine.submit("a", [1], ask(None))

    def loop() -> None:
        while not stop.is_set():
            engine.tick()
            generation.take(1000)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        waited = []
        for _ in range(20):
            before = seen[0]
            engine.info("a")
            waited.append(seen[0] - before)
            time.sleep(0.003)
    finally:
        stop.set()
        thread.join()
    assert seen[0] > 10
    assert sorted(waited)[len(waited) // 2] <= 3  # more where this thread is not let run at once


def test_nothing_grows_with_a_stream() -> None:
    rules = {"seed": 1, "temperature": 1.5, "frequency_penalty": 0.1, "top_p": 0.9, "logprobs": 2}
    engine = make()
    engine.open("a")
    generation = engine.submit("a", [1], ask(None, stop=("never", "nor this"), **rules))

    def go_on(count: int) -> int:
        for _ in range(count):
            engine.tick()
            generation.take()
        return held_bytes(engine, generation)

    before = go_on(800)  # until every byte has been drawn and counted
    assert abs(go_on(800) - before) < 800  # not even a byte a token
    assert engine.info("a").position == 1 + 1600
