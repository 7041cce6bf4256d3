"""A checkpoint for which a host has no room is left out, told, and never half there."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.pipelines.fake_training import MEMORY, FolderStore, tiny_config
from pipelines.training import recorder
from pipelines.training.contract import Worker
from pipelines.training.trainer import train
from pipelines.training.worker import RayCheckpoints
from pipelines.worker_group.room import is_full, no_room, require_room, telling_room

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RayCheckpoints, list[Any]]:
    """Checkpoints of a run through a Ray Train that only takes notes, and the notes."""
    import ray.train

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    reports: list[Any] = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, **more: reports.append(more))
    return RayCheckpoints(str(tmp_path / "run"), Worker()), reports


def raising(error: Exception) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise error

    return write


def whole(folder: Path) -> None:
    (folder / "whole").write_bytes(b"x" * 1000)


@pytest.mark.parametrize("error", FULL, ids=["errno", "words"])
def test_a_full_disk_leaves_a_checkpoint_out(
    store: tuple[RayCheckpoints, list[Any]], tmp_path: Path, error: Exception
) -> None:
    checkpoints, reports = store
    problem = checkpoints.save(raising(error), {"step": 1})
    assert problem is not None
    assert str(tmp_path / "scratch") in problem
    assert " GB free" in problem
    assert (reports, list((tmp_path / "scratch").iterdir())) == ([], [])
    assert checkpoints.save(whole, {"step": 2}) is None
    assert len(reports) == 1


def test_another_error_is_raised(store: tuple[RayCheckpoints, list[Any]]) -> None:
    with pytest.raises(PermissionError):
        store[0].save(raising(PermissionError(errno.EACCES, "denied")), {"step": 1})
    assert not is_full(PermissionError(errno.EACCES, "denied"))


def test_a_checkpoint_that_will_not_fit_is_not_begun(
    store: tuple[RayCheckpoints, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, reports = store
    assert checkpoints.save(whole, {"step": 1}) is None
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20 + 999))
    problem = checkpoints.save(lambda _: pytest.fail("begun"), {"step": 2})
    assert problem is not None
    assert re.search(
        r"has 67\.1 MB of [\d.]+ GB free and a checkpoint takes 67\.1 MB; free", problem
    )
    require_room(0)  # the size of the first one is not known
    with pytest.raises(OSError, match="no room"):
        require_room(1000)
    assert len(reports) == 1


def test_what_a_lost_group_left_of_the_same_checkpoint_is_removed(
    store: tuple[RayCheckpoints, list[Any]], tmp_path: Path
) -> None:
    """Files of two numbers of workers would be mixed, and their digests contradict each other."""
    left = tmp_path / "run" / "checkpoint_00000001"
    left.mkdir(parents=True)
    (left / "model-00000-of-00002.safetensors").write_bytes(b"old")
    other = tmp_path / "run" / "checkpoint_00000002"
    other.mkdir()
    assert store[0].save(whole, {"step": 1}) is None
    assert not left.exists()
    assert other.exists()


def test_an_error_of_a_full_disk_tells_what_is_free(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "metrics.jsonl"  # of which the folder is not there
    with (
        pytest.raises(
            OSError, match=r"No space left on device \([\d.]+ [GM]B of [\d.]+ GB free\)"
        ) as told,
        telling_room(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    assert told.value.filename == str(path)
    assert is_full(told.value)
    with pytest.raises(PermissionError), telling_room():
        raise PermissionError(errno.EACCES, "denied")


def test_shares_of_sharded_models_are_written_by_the_thread_that_uploads(
    store: tuple[RayCheckpoints, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train

    class Storage:
        def persist_current_checkpoint(self, checkpoint: Any, name: str) -> str:
            return f"{name}: {[file.name for file in Path(checkpoint).iterdir()]}"

    context = SimpleNamespace(get_storage=Storage)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    checkpoints = RayCheckpoints(str(tmp_path / "run"), Worker(), in_background=True)
    assert checkpoints.save(whole, {"step": 1}) is None
    (report,) = store[1]
    folder = Path(report["checkpoint"].path)
    assert list(folder.iterdir()) == []  # training goes on
    assert report["checkpoint_upload_fn"](folder, "name") == "name: ['whole']"
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20 + 999))
    assert "a checkpoint takes 67.1 MB; free" in str(checkpoints.save(whole, {"step": 2}))


class FullStore(FolderStore):
    """Has no room for the checkpoints of some steps, at the first attempts."""

    def __init__(self, folder: Path, full: dict[int, int]) -> None:
        super().__init__(folder)
        self.full = full

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> str | None:
        left = self.full.get(metrics["step"], 0)
        if left:
            self.full[metrics["step"]] = left - 1
            return no_room(0)
        super().save(write, metrics)
        return None


def test_training_goes_on_without_it_and_waits_only_for_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(recorder.time, "sleep", pauses.append)
    lines: list[str] = []
    store = FullStore(tmp_path / "checkpoints", {4: 1, 12: 3})
    outcome = train(tiny_config(tmp_path, name="run"), Worker(), MEMORY, store, lines.append)
    assert outcome.step == 12
    told = [line for line in lines if line.startswith("WARNING: no checkpoint of step ")]
    assert [line.split(" step ")[1].split(":")[0] for line in told] == ["4", "12", "12", "12"]
    assert pauses == [recorder.RETRY_S] * 3
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint_00000008", "checkpoint_00000012"]
