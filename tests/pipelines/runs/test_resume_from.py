"""A damaged run on S3 goes on from its newest whole checkpoint; a named one must be whole."""

from __future__ import annotations

import io
import json

import pytest

from helpers.pipelines.fake_training import change
from pipelines.recipes.images import debug
from pipelines.runs.checkpoints import CheckpointError, resolve_checkpoint
from pipelines.training import launch as job

RUN = "s3://went-back/runs/debug"
LIST = f"{RUN}/checkpoint_manager_snapshot.json"


@pytest.mark.slow  # the parts: `test_run_checkpoints.py` goes back, `test_pretrain.py` resumes
def test_a_run_on_ray_goes_on_from_the_newest_whole_checkpoint_bitwise(
    cifar_shards, s3, monkeypatch
):
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    import s3fs

    remote = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    remote.mkdir("went-back")
    often = {"log_every": 1, "checkpoint_every": 4, "keep_checkpoints": 9, "threads": 1}
    cfg = change(
        debug(),
        data={"train": cifar_shards[0], "test": cifar_shards[1]},
        run={"storage": "s3://went-back/runs", "steps": 12, "probe_every": 4, **often},
    )
    job.pretrain(cfg, stream=io.StringIO())
    listed = json.loads(remote.cat_file(LIST))
    end = _files(remote, f"{RUN}/checkpoint_00000012")

    remote.rm(f"{RUN}/checkpoint_00000012", recursive=True)
    model = f"{RUN}/checkpoint_00000008/model-00000-of-00001.safetensors"
    damaged = bytearray(remote.cat_file(model))
    damaged[-2] ^= 1
    remote.pipe_file(model, bytes(damaged))
    with monkeypatch.context() as patch:
        patch.setattr(job, "start_ray", lambda *a, **k: pytest.fail("Ray was started first"))
        with pytest.raises(CheckpointError, match="checkpoint_00000012: is missing"):
            job.pretrain(change(cfg, run={"resume_from": "checkpoint_00000012"}))

    shown = io.StringIO()
    result = job.pretrain(cfg, stream=shown)
    said = shown.getvalue()
    assert "going on from checkpoint_00000008: checkpoint_00000012 is missing" in said
    assert "going on from checkpoint_00000004: checkpoint_00000008 (model-00000-of-00001" in said
    assert "is damaged: its sha256 is not" in said
    assert "resuming run 'debug' at step 4" in said
    again = json.loads(remote.cat_file(LIST))
    assert [_untimed(r) for r in again["checkpoint_results"]] == [
        _untimed(r) for r in listed["checkpoint_results"]
    ]
    assert again["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoint_00000012"
    assert result.last_checkpoint == f"{RUN}/checkpoint_00000012"
    scores = {r["metrics"]["step"]: r["metrics"]["knn"] for r in again["checkpoint_results"]}
    best = max(scores, key=lambda step: (scores[step], step))
    assert resolve_checkpoint(RUN) == result.best_checkpoint == f"{RUN}/checkpoint_{best:08d}"
    assert _files(remote, f"{RUN}/checkpoint_00000012") == end


def _untimed(result):
    return result["checkpoint_dir_name"], result["metrics"]


def _files(remote, folder):
    paths = remote.glob(f"{folder}/*.safetensors")
    return {path.rpartition("/")[2]: remote.cat_file(path) for path in paths}
