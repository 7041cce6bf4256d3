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

from serve import token_log
from serve.session_store import OtherModel, SessionExists, SessionStore, Turn, UnknownSession
from serve.token_log import LocalLog, LostSession, MemoryLog, SegmentedLog, read_segments


@pytest.fixture(params=["local", "memory://"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SessionStore:
    uri = str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return SessionStore(uri, "model-a")


def state(position: int) -> dict[str, torch.Tensor]:
    return {"keys": torch.full((2, 3), float(position)), "length": torch.tensor(position)}


def test_a_session_comes_back(store: SessionStore) -> None:
    first = store.create("chat", "replica-1", sinks=4, ttl_s=60)
    first.begin_turn(Turn(request_id="r", prompt_from=0, answer_from=3))
    first.log.append([5, 6, 7])
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


def test_other_models_and_names_are_refused(store: SessionStore, tmp_path: Path) -> None:
    store.create("chat", "replica", sinks=4, ttl_s=None).close()
    with pytest.raises(SessionExists):
        store.create("chat", "replica", sinks=4, ttl_s=None)
    for name in ("../chat", "", "a/b", ".hidden"):
        assert not store.exists(name)
        with pytest.raises(UnknownSession):
            store.open(name, "replica")
    here = SessionStore(str(tmp_path), "model-a")
    here.create("mine", "replica", sinks=4, ttl_s=None).close()
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
    session.save_snapshot(40, state(40))  # of tokens that the log has lost
    assert session.newest_snapshot() == (0, {})
    assert not list(tmp_path.rglob("*.part"))
    session.close()


def test_segments_go_out_together_and_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_log, "GATHER_S", 0.0)
    monkeypatch.setattr(token_log, "MERGE_SEGMENTS", 3)
    fs = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    log = SegmentedLog(fs, folder, epoch=1)
    for token in range(20):
        log.append([token])
        deadline = time.monotonic() + 5
        while log.durable < log.position and time.monotonic() < deadline:
            time.sleep(0.001)
        assert log.durable == log.position
    log.close()
    assert len(fs.glob(f"{folder}/*.i32")) <= 20 // 3 + 3
    assert read_segments(fs, folder).tolist() == list(range(20))


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
    assert read_segments(fs, folder).tolist() == [1, 2, 3]


def test_a_store_that_fails_is_told_to_whoever_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_log, "GATHER_S", 0.0)
    fs = fsspec.filesystem("memory")
    log = SegmentedLog(fs, f"/{uuid.uuid4().hex}", epoch=1)

    def fail(*_: object) -> None:
        raise OSError("no space")

    told: list[bool] = []
    log.when_durable(lambda: told.append(True))
    monkeypatch.setattr(fs, "pipe_file", fail)
    log.append([1])
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(0.001)
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
from serve.token_log import LocalLog
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
