"""Sessions on disk and in an object store: what survives, what is refused, who owns them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec
import pytest
import torch

from helpers.waiting import wait_until
from models.sink_lm.engine.session import SessionExists, UnknownSession
from serve.lm.store import segmented_log
from serve.lm.store.segmented_log import SegmentedLog, list_segments
from serve.lm.store.session_store import (
    OtherModel,
    SessionStore,
    StoredSession,
    Turn,
)
from serve.lm.store.token_log import LocalLog, LostSession, MemoryLog


@pytest.fixture(params=["local", "memory://"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SessionStore:
    uri = str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return SessionStore(uri, "model-a")


def make(store: SessionStore, name: str, **more: str) -> StoredSession:
    stored = store.create(name, "replica", sinks=4, ttl_s=None, **more)
    stored.publish()
    return stored


def read_log(fs: fsspec.AbstractFileSystem, folder: str) -> list[int]:
    log = SegmentedLog(fs, folder, epoch=99)
    tokens = log.read(0)
    log.close()
    return tokens


def state(position: int) -> dict[str, torch.Tensor]:
    return {"keys": torch.full((2, 3), float(position)), "length": torch.tensor(position)}


def test_a_session_comes_back(store: SessionStore) -> None:
    first = store.create("chat", "replica-1", sinks=4, ttl_s=60)
    first.begin_turn(Turn(request_id="r", prompt_from=0, answer_from=3))
    first.log.append([5, 6, 7])
    assert store.names() == []  # nobody sees a session before it is published
    first.publish()
    first.log.append([70_000])
    first.save_snapshot(2, state(2))
    first.close()
    again = store.open("chat", "replica-2")
    assert (again.log.position, again.log.durable) == (4, 4)
    assert again.log.read(0) == [5, 6, 7, 70_000]
    assert again.log.read(1, 3) == [6, 7]
    position, tensors = again.newest_snapshot()
    assert position == 2
    assert torch.equal(tensors["keys"], state(2)["keys"])
    assert store.turn("chat") == Turn(request_id="r", prompt_from=0, answer_from=3)
    assert (again.spec.sinks, again.spec.ttl_s) == (4, 60)
    assert store.names() == ["chat"]
    assert abs(store.last_used("chat") - time.time()) < 60
    again.close()
    store.delete("chat")
    assert store.names() == []
    with pytest.raises(UnknownSession):
        store.open("chat", "replica-2")


def test_whoever_opens_a_session_owns_it(store: SessionStore) -> None:
    old = store.create("chat", "replica-1", sinks=4, ttl_s=None)
    old.log.append([1, 2])
    old.publish()
    old.log.close()
    assert old.is_owned()
    new = store.open("chat", "replica-2")
    assert new.epoch == old.epoch + 1
    assert new.is_owned()
    assert not old.is_owned()
    new.close()


def test_another_owner_s_tokens_are_not_written_over(tmp_path: Path) -> None:
    old, new = LocalLog(tmp_path / "log"), LocalLog(tmp_path / "log")
    old.append([1])
    with pytest.raises(LostSession):
        new.append([2])  # it has not seen the 1
    latest = LocalLog(tmp_path / "log")
    latest.append([3])
    with pytest.raises(LostSession):
        old.append([4])
    assert latest.read(0) == [1, 3]
    for log in (old, new, latest):
        log.close()


def test_a_torn_write_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\1\0\0\0\2\0\0\0\3\0")
    log = LocalLog(tmp_path / "log")
    assert log.read(0) == [1, 2]
    log.append([9])
    log.close()
    assert (tmp_path / "log").read_bytes() == b"\1\0\0\0\2\0\0\0\t\0\0\0"


def test_a_disk_that_fills_up_in_a_write_costs_that_write_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "tokens.i32", os.write
    log = LocalLog(path)
    log.append([1, 2])
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:6]))  # a token and a half
    with pytest.raises(OSError, match="cut short"):
        log.append([3, 4, 5])
    monkeypatch.undo()
    assert (log.position, path.stat().st_size) == (2, 8)
    log.append([6])
    assert LocalLog(path).read(0) == [1, 2, 6]


def test_other_models_and_names_are_refused(store: SessionStore, tmp_path: Path) -> None:
    make(store, "chat").close()
    with pytest.raises(SessionExists):
        store.create("chat", "replica", sinks=4, ttl_s=None)
    for name in ("../chat", "", "a/b", ".hidden"):
        assert not store.exists(name)
        with pytest.raises(UnknownSession):
            store.open(name, "replica")
    here = SessionStore(str(tmp_path), "model-a")
    make(here, "mine").close()
    with pytest.raises(OtherModel, match="model-b"):
        SessionStore(str(tmp_path), "model-b").open("mine", "replica")


def test_snapshots_are_few_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    store = SessionStore(str(tmp_path), "model-a")
    session = store.create("chat", "replica", sinks=4, ttl_s=None)
    session.log.append(range(30))
    for position in (10, 20, 30):
        session.save_snapshot(position, state(position))
    assert store.snapshots("chat") == [30, 20]
    newest = Path(store.snapshot_paths("chat")[0])
    newest.write_bytes(newest.read_bytes()[:40])
    assert session.newest_snapshot()[0] == 20
    with pytest.raises(ValueError, match="40 tokens"):
        session.save_snapshot(40, state(40))  # of tokens that are not in the log
    session.publish()
    session.close()
    (newest.parent / ".half").write_bytes(b"a replica was killed while it wrote this")
    again = store.open("chat", "replica")
    assert not (newest.parent / ".half").exists()
    assert again.newest_snapshot()[0] == 20
    again.close()


def test_a_snapshot_of_all_tokens_is_the_newest(store: SessionStore) -> None:
    """Every eviction writes such a snapshot; without it each load would read the whole stream."""
    session = make(store, "chat")
    session.log.append(range(10))
    for position in (4, 10):
        session.save_snapshot(position, state(position))
    position, newest = session.newest_snapshot()
    assert (position, int(newest["length"])) == (10, 10)
    session.log.append([11])
    assert session.newest_snapshot()[0] == 10


def test_a_snapshot_of_other_tokens_than_the_log_s_does_not_count(store: SessionStore) -> None:
    """A replica that lost the session without knowing it yet generates on and snapshots that."""
    old = make(store, "chat")
    old.log.append(range(10))
    old.log.wait(10)
    new = store.open("chat", "replica-2")
    new.log.append([100, 101, 102])
    new.log.wait(13)
    if isinstance(old.log, LocalLog):
        with pytest.raises(LostSession):
            old.log.append([90, 91])
        with pytest.raises(ValueError, match="12 tokens"):
            old.save_snapshot(12, state(12))
    else:
        old.log.append([90, 91])
        old.save_snapshot(12, state(12))
        assert store.snapshots("chat") == [12]
    assert new.log.read(0) == [*range(10), 100, 101, 102]
    assert new.newest_snapshot() == (0, {})
    new.save_snapshot(11, state(11))
    assert new.newest_snapshot()[0] == 11
    assert store.snapshots("chat") == [11]  # the one ahead was of a stream that nobody went on with
    old.close()
    new.close()


def test_a_snapshot_waits_for_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the replica is killed between the two, the log must not be the shorter one."""
    monkeypatch.setattr(segmented_log, "GATHER_S", 0.2)
    store = SessionStore(f"memory://{uuid.uuid4().hex}", "model-a")
    session = make(store, "chat")
    session.log.append([1, 2, 3])
    assert session.log.durable == 0
    session.save_snapshot(3, state(3))
    assert session.log.durable == 3
    session.close()


def test_a_session_is_made_once_and_known_by_who_made_it(store: SessionStore) -> None:
    broken_off = store.create("chat", "replica-1", sinks=4, ttl_s=None, request_id="first")
    broken_off.log.append([1, 2])
    broken_off.close()  # the replica died before it was done: the name is free
    assert not store.exists("chat")
    made = make(store, "chat", request_id="second")
    assert (store.spec("chat").request_id, made.log.position) == ("second", 0)
    with pytest.raises(SessionExists):
        broken_off.publish()
    made.close()


def test_segments_go_out_together_and_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmented_log, "GATHER_S", 0.0)
    monkeypatch.setattr(segmented_log, "MERGE_SEGMENTS", 3)
    fs = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    log = SegmentedLog(fs, folder, epoch=1)
    for token in range(20):
        log.append([token])
        wait_until(lambda: log.durable == log.position, every_s=0.001)
    log.close()
    assert len(fs.glob(f"{folder}/*.i32")) <= 20 // 9 + 2 + 2
    assert read_log(fs, folder) == list(range(20))


def test_segments_that_cannot_be_merged_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmented_log, "GATHER_S", 0.0)
    monkeypatch.setattr(segmented_log, "MERGE_SEGMENTS", 3)
    fs = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    log = SegmentedLog(fs, folder, epoch=1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("slow down")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "rm", fail)
        for token in range(10):
            log.append([token])
            log.wait(token + 1)
    log.append([10])
    log.close()
    assert read_log(fs, folder) == list(range(11))


def test_a_long_log_is_few_objects_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds with many owners, each of which leaves some small segments."""
    monkeypatch.setattr(segmented_log, "GATHER_S", 0.0)
    monkeypatch.setattr(segmented_log, "MERGE_SEGMENTS", 4)
    fs = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    for epoch in range(1, 41):
        log = SegmentedLog(fs, folder, epoch)
        for _ in range(5):
            log.append([log.position])
            log.wait(log.position)
        assert log._waiting == []  # what is stored is not held in memory
        log.close()
    assert len(fs.glob(f"{folder}/*.i32")) < 200 // 16 + 2 * 4 + 1
    assert list_segments(fs, folder)[-1].stop == 200
    last = SegmentedLog(fs, folder, epoch=50)
    assert last.read(0) == list(range(200))
    assert [last.read(start, start + 7) for start in range(0, 190, 9)] == [
        list(range(start, start + 7)) for start in range(0, 190, 9)
    ]
    last.append([200, 201])
    assert last.read(198) == [198, 199, 200, 201]  # stored or not
    last.close()


def test_to_open_a_log_is_to_list_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SessionStore(f"memory://{uuid.uuid4().hex}", "model-a")
    session = make(store, "chat")
    session.log.append(range(1_000))
    session.close()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a segment was read")

    monkeypatch.setattr(store.fs, "cat_file", fail)
    assert store.position("chat") == 1_000
    log = SegmentedLog(store.fs, f"{store.folder('chat')}/tokens", epoch=2)
    assert (log.position, log.durable) == (1_000, 1_000)
    log.close()


def test_an_earlier_owner_s_merge_and_a_broken_one_change_nothing() -> None:
    fs = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    old = SegmentedLog(fs, folder, epoch=1)
    for token in range(4):
        old.append([token])
        old.wait(token + 1)
    new = SegmentedLog(fs, folder, epoch=2)
    new.append([4])
    new.wait(5)
    old.append([77])  # does not know yet that it lost the session
    old.wait(5)
    segments = list_segments(fs, folder)
    assert [segment.stop for segment in segments] == [1, 2, 3, 4, 5]
    fs.pipe_file(segments[0].path, fs.cat_file(segments[0].path) + fs.cat_file(segments[1].path))
    assert new.read(0) == [0, 1, 2, 3, 4]  # a merge that broke off: the piece lies in the whole
    fs.rm(segments[1].path)
    assert new.read(0) == [0, 1, 2, 3, 4]  # and one that was carried out under us
    fs.rm(segments[3].path)
    with pytest.raises(OSError, match="3 tokens lie before it, not 4"):
        new.read(0)
    old.close()
    new.close()


def test_a_later_owner_s_segments_count() -> None:
    fs = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    old = SegmentedLog(fs, folder, epoch=1)
    old.append([1, 2])
    old.close()
    new = SegmentedLog(fs, folder, epoch=2)
    stale = SegmentedLog(fs, folder, epoch=1)
    new.append([3])
    new.close()
    stale.append([8, 9])  # a replica that does not know yet that it lost the session
    stale.close()
    assert read_log(fs, folder) == [1, 2, 3]


def test_a_store_that_fails_is_told_to_whoever_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmented_log, "GATHER_S", 0.0)
    fs = fsspec.filesystem("memory")
    log = SegmentedLog(fs, f"/{uuid.uuid4().hex}", epoch=1)

    def fail(*_: object) -> None:
        raise OSError("no space")

    told: list[bool] = []
    log.when_durable(lambda: told.append(True))
    monkeypatch.setattr(fs, "pipe_file", fail)
    log.append([1])
    wait_until(lambda: told, every_s=0.001)
    assert log.durable == 0
    with pytest.raises(OSError, match="no space"):
        log.append([2])


def test_a_memory_log_counts_only() -> None:
    log = MemoryLog()
    log.append([1, 2, 3])
    assert (log.position, log.durable, log.read(3)) == (3, 3, [])
    with pytest.raises(LookupError):
        log.read(2)


WRITER = """
import itertools, sys
from pathlib import Path
from serve.lm.store.token_log import LocalLog
log = LocalLog(Path(sys.argv[1]))
for token in itertools.count():
    log.append([token])
    print(token, flush=True)
"""


def test_what_was_appended_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "log"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        seen = [int(next(writer.stdout)) for _ in range(2_000)]
        os.kill(writer.pid, signal.SIGKILL)
        seen += [int(line) for line in writer.stdout if line.endswith("\n")]
    log = LocalLog(path)
    assert log.read(0)[: len(seen)] == seen
    log.close()
