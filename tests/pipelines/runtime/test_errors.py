"""Which errors are reported in a line, which show their traceback, and what Ray's wrappers hold."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import grpc
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from ray.exceptions import AuthenticationError, RayTaskError, UserCodeException
from ray.train import ControllerError, WorkerGroupError

from helpers.pipelines.refusals import Told, teller
from helpers.repository import ROOT
from pipelines.config.ingest import IngestConfig
from pipelines.config.jobs import ExportConfig
from pipelines.config.places import places
from pipelines.config.run import RunConfig
from pipelines.config.train import PretrainConfig
from pipelines.export import export
from pipelines.runtime.cluster import JOB_ENV, runtime_env, start_ray
from pipelines.runtime.errors import TRACEBACK, explain, run_command
from pipelines.runtime.places import absolute

CFG = IngestConfig(source="/data/pics", out="/disk/shards")
TASK = """\x1b[36mray::Map(stage_chunk)()\x1b[39m (pid=31402, ip=192.0.2.2)
  File "/checkout/pipelines/staging.py", line 170, in stage_chunk
    parts.flush()
{last}

The above exception was the direct cause of the following exception:

ray::Map(stage_chunk)() (pid=31402, ip=192.0.2.2)
ray.exceptions.UserCodeException: UDF failed to process a data block.
To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext`.
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return teller(monkeypatch, capsys)


def from_ray_data(last: str) -> Exception:
    """Raises a task's error as Ray Data does: only the text of its traceback is left."""
    task = RayTaskError("stage_chunk", TASK.format(last=last), UserCodeException("UDF failed"))
    return task.as_instanceof_cause()


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (
            "OSError: [Errno 28] No space left on device",
            "--out: /disk/shards: no space left on the disk\nFree some, or name another folder.",
        ),
        (
            "PermissionError: [Errno 13] Permission denied: '/disk/shards/_staging'",
            (
                "--out: /disk/shards: this user may not read or write there "
                "(/disk/shards/_staging)\nName another folder."
            ),
        ),
        (
            "FileNotFoundError: [Errno 2] No such file or directory: '/data/pics/a.png'",
            "--source: /data/pics: not there (/data/pics/a.png)",
        ),
        ("ValueError: /data/pics/x.tar is odd", "--source: /data/pics/x.tar is odd"),
        (
            "pipelines.runs.checkpoint_format.CheckpointError: /r/c: does not load",
            "/r/c: does not load",
        ),
    ],
)
def test_what_a_ray_data_task_met_is_told(last: str, expected: str) -> None:
    assert explain(from_ray_data(last), places(CFG)) == expected


def test_s3_errors_of_a_task_are_told() -> None:
    cfg = dataclasses.replace(CFG, source="s3://raw/pics")
    last = "botocore.exceptions.NoCredentialsError: Unable to locate credentials"
    told = explain(from_ray_data(last), places(cfg))
    assert told is not None
    assert told.startswith("--source: s3://raw/pics: no credentials for S3")
    last = "FileNotFoundError: The specified bucket does not exist"
    told = explain(from_ray_data(last), places(cfg))
    assert told == ("--source: s3://raw/pics: there is no such bucket\nMake it, or name another.")


def test_what_a_train_worker_or_controller_met_is_told() -> None:
    cfg = PretrainConfig(run=RunConfig(storage="/disk/runs"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    expected = "--run.storage: /disk/runs: no space left on the disk"
    for error in (
        WorkerGroupError("words", {1: ValueError("later"), 0: full}),
        ControllerError(full),
        RayTaskError("train", "words", full).as_instanceof_cause(),
    ):
        assert (explain(error, places(cfg)) or "").startswith(expected)


@pytest.mark.parametrize(
    "bug", [KeyError("x"), AssertionError("lost"), TypeError("no"), RuntimeError("what")]
)
def test_faults_of_ours_show_their_traceback(bug: Exception) -> None:
    def job(cfg: IngestConfig) -> None:
        raise bug

    with pytest.raises(type(bug)):
        run_command(lambda: CFG, job)
    task = RayTaskError("f", "words", bug).as_instanceof_cause()
    assert explain(task, places(CFG)) is None
    assert explain(from_ray_data(f"{type(bug).__name__}: x"), places(CFG)) is None


def test_a_variable_shows_the_traceback_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(cfg: IngestConfig) -> None:
        raise ValueError("--out: wrong")

    with pytest.raises(SystemExit, match=r"^error: --out: wrong$"):
        run_command(lambda: CFG, job)
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="wrong"):
        run_command(lambda: CFG, job)


def test_interruption_and_missing_packages_are_told() -> None:
    def interrupted(cfg: IngestConfig) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"^error: interrupted; the same command goes on"):
        run_command(lambda: CFG, interrupted)

    def missing(cfg: IngestConfig) -> None:
        import no_such_package_at_all.part  # noqa: F401

    with pytest.raises(SystemExit, match=r"pip install no_such_package_at_all$"):
        run_command(lambda: CFG, missing)
    ours = ModuleNotFoundError("No module named 'pipelines.gone'", name="pipelines.gone")
    assert explain(ours, []) is None


class FullDisk(MemoryFileSystem):
    """A file system without a byte to spare."""

    protocol = "fulldisk"
    store: dict[str, object] = {}  # noqa: RUF012  # as its base has it

    def pipe_file(self, path: str, value: bytes, **_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def test_a_full_disk_is_told_before_the_first_image_is_read(told: Told, tmp_path: Path) -> None:
    fsspec.register_implementation("fulldisk", FullDisk, clobber=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    said = told("ingest", "--source", tmp_path, "--out", "fulldisk://shards")
    assert said.startswith("error: --out: fulldisk://shards: no space left on the disk")


def test_embed_of_a_run_says_to_export_it(
    told: Told, small_checkpoint: str, tmp_path: Path
) -> None:
    arguments = ("--artifact", small_checkpoint, "--data", tmp_path, "--out", tmp_path / "out")
    said = told("embed", *arguments)
    assert f"--artifact: {small_checkpoint} is a run or a checkpoint" in said
    assert f"pipelines.export --checkpoint {small_checkpoint}" in said


def test_export_and_embed_leave_folders_of_others_alone(
    told: Told, small_checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    said = told("export", "--checkpoint", small_checkpoint, "--out", tmp_path)
    assert said.startswith(f"error: --out: {tmp_path} exists and is not an artifact of ours")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["my run ü", "", "a\nb", "..", "a/../../b", "/root", "猫"])
def test_run_names_that_ray_refuses_are_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=r"--run\.name: "):
        RunConfig(name=name)


@pytest.mark.parametrize("name", ["run", "my run #2", "vits-16_lr0.1", "2026/11/29"])
def test_run_names_that_ray_takes(name: str) -> None:
    assert RunConfig(name=name).name == name


def test_places_become_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    cfg = absolute(IngestConfig(source="pics/", out="~/shards"))
    assert (cfg.source, cfg.out) == (f"{tmp_path}/pics", "/home/somebody/shards")
    assert absolute(cfg) == cfg
    cfg = absolute(IngestConfig(source=f"file://{tmp_path}/a b", out="s3://bucket/x/"))
    assert (cfg.source, cfg.out) == (f"{tmp_path}/a b", "s3://bucket/x")
    stream = IngestConfig(source="rtsp://camera/1", out="live", follow=True)
    assert absolute(stream).source == "rtsp://camera/1"
    (tmp_path / "link").symlink_to("/usr")
    assert absolute(ExportConfig(checkpoint="link", out="link/../x")) == ExportConfig(
        checkpoint=f"{tmp_path}/link", out="/x"
    )


def test_export_takes_relative_places_and_file_uris(
    small_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = ExportConfig(checkpoint=os.path.relpath(small_checkpoint), out="file://artifact")
    assert export(cfg) == str(tmp_path / "artifact")
    assert json.loads((tmp_path / "artifact" / "config.json").read_text())["rayjepa"]


def test_errors_that_a_command_itself_defines_are_told() -> None:
    """Run as a program its module is `__main__`, and so is that of its errors."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        command = [sys.executable, "-m", "pipelines.chat", "--url", url]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --url: no answer from {url}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001", "head", "127.0.0.1:1"])
def test_addresses_that_are_no_ray_are_refused_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        (ValueError, ConnectionError), match=f"^RAY_ADDRESS: .*{address}"
    ) as refused:
        start_ray()
    assert explain(refused.value, []) == str(refused.value)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A gRPC server that refuses every call with a code, and is the Ray that RAY_ADDRESS names."""
    refused: dict[str, grpc.StatusCode] = {}

    class Refusing(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            def refuse(_: bytes, context: Any) -> None:
                context.abort(refused["code"], "no")

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    yield refused
    server.stop(None)


def test_a_cluster_that_wants_another_token_is_told_at_once(foreign: Any) -> None:
    foreign["code"] = grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(AuthenticationError) as refused:
        start_ray()
    first, way_out = (explain(refused.value, []) or "").splitlines()
    assert first.startswith("the Ray cluster refuses the token of this process")
    assert "RAY_AUTH_TOKEN" in way_out


def test_what_is_no_ray_is_told_at_once(foreign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign["code"] = grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(ConnectionError, match=r"^RAY_ADDRESS: no Ray answers at 127\.0\.0\.1:"):
        start_ray()
    with socket.socket() as mute:  # takes connections and says nothing
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{mute.getsockname()[1]}")
        monkeypatch.setattr("pipelines.runtime.cluster.ANSWER_S", 0.5)
        with pytest.raises(ConnectionError, match="no Ray answers"):
            start_ray()


def test_a_ray_of_its_own_has_room_and_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard takes seconds to start, and no command asks it anything."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda *_, **settings: asked.update(settings))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    start_ray(1000.5, training=True)
    assert asked["num_cpus"] == 1001
    assert asked["include_dashboard"] is False


def test_workers_are_told_where_the_packages_are_unless_a_job_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(JOB_ENV, raising=False)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    told = {"env_vars": {"PYTHONPATH": f"{ROOT}{os.pathsep}/mine"}}
    assert runtime_env() == told
    for job, expected in (
        ({"runtime_env": {"working_dir": "gcs://x.zip"}}, None),
        ({"runtime_env": {"env_vars": {"PYTHONPATH": "/theirs"}}}, None),
        ({"runtime_env": {"env_vars": {"A": "b"}}}, told),
        ({"metadata": {}}, told),
    ):
        monkeypatch.setenv(JOB_ENV, json.dumps(job))
        assert runtime_env() == expected


@pytest.mark.ray
def test_what_a_task_meets_is_told_by_the_command(
    ray_local: None, told: Told, tmp_path: Path
) -> None:
    source, out = tmp_path / "pics", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    Image.new("RGB", (8, 8)).save(source / "a.png")
    (out / "_staging").write_text("a file where the tasks need a folder")
    said = told("ingest", "--source", source, "--out", out)
    assert said.startswith(f"error: --out: {out}: a file is where a folder must be")


@pytest.mark.ray
def test_the_command_joins_ray_from_another_folder(ray_local: None, tmp_path: Path) -> None:
    """Uninstalled, its places relative to a folder that Ray's workers do not run in."""
    import ray

    source = tmp_path / "pics"
    source.mkdir()
    Image.new("RGB", (8, 8)).save(source / "a.png")
    address = ray.get_runtime_context().gcs_address
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", TRACEBACK)}
    done = subprocess.run(
        [sys.executable, ROOT / "pipelines" / "ingest.py", "--source", "pics", "--out", "shards"],
        cwd=tmp_path,
        env=env | {"RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "shards" / "manifest.json").is_file()
