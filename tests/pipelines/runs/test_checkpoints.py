"""Checkpoint folders: several writers, one reader, and what makes a checkpoint unusable."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from helpers.pipelines.fake_training import change, tiny_config
from pipelines.runs.checkpoints import (
    CheckpointError,
    CheckpointState,
    check_resumable,
    load_encoder,
    load_objective,
    load_tensors,
    read_config,
    resolve_checkpoint,
    save_checkpoint,
)
from pipelines.training.state import new_state

CPU = torch.device("cpu")


@pytest.fixture
def cfg(tmp_path):
    return tiny_config(tmp_path)


def _trained(cfg, seed=0):
    """A state after some steps, with optimizer moments and meters that are not empty."""
    state = new_state(change(cfg, run={"seed": seed}), CPU)
    for parameter in state.objective.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.watches["target_pooled"].update(torch.randn(6, 96))
    state.meter.update({"loss": torch.tensor(0.5)})
    state.step = 1
    return state


def _saved(step=1, world_size=1, **fields):
    return CheckpointState(
        step=step,
        position=8 * step,
        epoch=0.2,
        manifest_hash="memory-hash",
        world_size=world_size,
        **fields,
    )


def _save(folder, cfg, state, world_size=1):
    folder.mkdir(parents=True)
    for rank in range(world_size):
        saved = _saved(world_size=world_size, strikes={"target_pooled": 1}, metrics={"knn": 0.25})
        save_checkpoint(folder, state.tensors(), saved, cfg, rank=rank)
    return folder


def _assert_same(ours, theirs):
    for group in ("model", "optimizer", "loop"):
        assert ours[group].keys() == theirs[group].keys()
        for name, value in ours[group].items():
            assert torch.equal(value, theirs[group][name]), name


@pytest.mark.parametrize("world_size", [1, 3])
def test_shares_of_any_number_of_processes_are_read_back_bitwise(cfg, tmp_path, world_size):
    state = _trained(cfg)
    before = {g: {n: t.clone() for n, t in ts.items()} for g, ts in state.tensors().items()}
    folder = _save(tmp_path / "ck", cfg, state, world_size)
    if world_size > 1:
        sizes = [p.stat().st_size for p in sorted(folder.glob("model-*"))]
        assert len(sizes) == world_size
        assert max(sizes) < 0.5 * sum(sizes)  # divided, not copied

    other = _trained(cfg, seed=9)
    torch.manual_seed(123)
    # Rank 1 of a run of three takes back what rank 1 wrote (here all wrote the same).
    saved = other.restore(folder, rank=world_size - 1, world_size=world_size)
    _assert_same(other.tensors(), before)
    assert (other.step, other.metrics) == (1, {"knn": 0.25})
    assert other.watches["target_pooled"].strikes == 1
    assert saved.position == 8


def test_meters_of_two_processes_fold_into_one_that_goes_on_alone(cfg, tmp_path):
    state = _trained(cfg)
    folder = _save(tmp_path / "ck", cfg, state, world_size=2)
    alone = new_state(cfg, CPU)
    alone.restore(folder, rank=0, world_size=1)
    assert torch.equal(
        alone.watches["target_pooled"].state()["counts"],
        2 * state.watches["target_pooled"].state()["counts"],
    )
    assert alone.meter.reading() == {"loss": 0.5}


def test_a_late_joiner_beyond_the_saved_processes_starts_with_empty_meters(cfg, tmp_path):
    folder = _save(tmp_path / "ck", cfg, _trained(cfg))
    late = new_state(cfg, CPU)
    late.restore(folder, rank=1, world_size=2)
    assert not late.watches["target_pooled"].state()["counts"].any()
    assert late.step == 1


def test_objective_and_encoder_come_back_without_the_optimizer(cfg, tmp_path):
    state = _trained(cfg)
    folder = _save(tmp_path / "ck", cfg, state)
    for part in [*folder.glob("optimizer-*"), *folder.glob("loop-*")]:
        part.unlink()
    objective, config, info = load_objective(str(folder))
    assert config == cfg
    assert (info["step"], info["manifest_hash"]) == (1, "memory-hash")
    for name, value in state.objective.state_dict().items():
        assert torch.equal(objective.state_dict()[name], value)
    encoder, _, _ = load_encoder(str(folder))
    target = state.objective.feature_encoder.state_dict()
    assert all(torch.equal(value, target[name]) for name, value in encoder.state_dict().items())


def _truncate(folder):
    path = next(folder.glob("model-*"))
    path.write_bytes(path.read_bytes()[:-100])


def _not_safetensors(folder):
    next(folder.glob("optimizer-*")).write_bytes(b"\x80\x04pickle")


def _missing_share(folder):
    next(folder.glob("loop-*")).unlink()


def _bad_state(folder):
    (folder / "state.json").write_text("{")


def _newer_format(folder):
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def _forget_digests(folder):
    for path in folder.glob("digests-*"):
        path.unlink()


def _other_model(folder):
    _forget_digests(folder)
    path = folder / "config.json"
    text = path.read_text().replace('"predictor_depth": null', '"predictor_depth": 1')
    path.write_text(text)


@pytest.mark.parametrize(
    "damage", [_truncate, _not_safetensors, _missing_share, _bad_state, _newer_format]
)
def test_a_damaged_checkpoint_is_an_error_that_names_it(cfg, tmp_path, damage):
    folder = _save(tmp_path / "ck", cfg, _trained(cfg))
    damage(folder)
    with pytest.raises(CheckpointError, match=str(folder)):
        new_state(cfg, CPU).restore(folder, rank=0, world_size=1)


def test_weights_of_another_model_are_an_error_that_names_them(cfg, tmp_path):
    folder = _save(tmp_path / "ck", cfg, _trained(cfg))
    _other_model(folder)
    with pytest.raises(CheckpointError, match=r"weights do not fit.*predictor"):
        load_objective(str(folder))
    other = new_state(change(cfg, model={"encoder": "vit_tiny32"}), CPU)
    before = other.objective.state_dict()["encoder.norm.weight"].clone()
    with pytest.raises(CheckpointError, match="weights do not fit"):
        other.restore(folder, rank=0, world_size=1)
    assert torch.equal(other.objective.state_dict()["encoder.norm.weight"], before)


def test_config_with_a_key_of_another_version_is_an_error(cfg, tmp_path):
    folder = _save(tmp_path / "ck", cfg, _trained(cfg))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "future": {}}))
    _forget_digests(folder)
    with pytest.raises(CheckpointError, match="future"):
        read_config(folder)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"data": {"batch_size": 16}}, "--data.batch-size was 8, is now 16"),
        ({"data": {"lanes": 4}}, "--data.lanes"),
        ({"data": {"shuffle_window": 7}}, "--data.shuffle-window"),
        ({"mask": {"num_targets": 3}}, "--mask.num-targets"),
        ({"model": {"encoder": "vit_tiny32"}}, "--model.encoder"),
        ({"objective": {"loss": "l2"}}, "--objective.loss"),
        ({"optim": {"lr": 5.0}}, "--optim.lr"),
        ({"run": {"seed": 1}}, "--run.seed"),
        ({"run": {"steps": 99}}, "--run.steps"),
    ],
)
def test_changed_settings_that_make_another_run_are_refused_by_flag(cfg, changes, flag):
    with pytest.raises(CheckpointError, match=flag):
        check_resumable(cfg, _saved(), change(cfg, **changes), "memory-hash")


def test_accumulation_must_not_change_if_the_loss_compares_rows(cfg):
    other = {"run": {"accumulate": 2}}
    for settings in ({"name": "lejepa"}, {"regularize": "x"}, {"target_norm": "batch"}):
        compares = change(cfg, objective=settings)
        with pytest.raises(CheckpointError, match=r"--run\.accumulate was 1, is now 2"):
            check_resumable(compares, _saved(), change(compares, **other), "memory-hash")
        with pytest.raises(ValueError, match=r"--run\.accumulate: .* two rows"):
            change(compares, run={"accumulate": cfg.data.batch_size})


@pytest.mark.parametrize(
    "changes",
    [
        {"run": {"workers": 2, "cpus_per_worker": 1.0, "precision": "bf16", "storage": "s3://x"}},
        {"run": {"accumulate": 2, "log_every": 1, "checkpoint_every": 3, "stop_after": 5}},
        {"data": {"train": "moved", "test": "elsewhere", "decode_in": "data"}},
        {"watch": {"action": "warn"}},
    ],
)
def test_settings_that_do_not_change_results_may_change(cfg, changes):
    check_resumable(cfg, _saved(), change(cfg, **changes), "memory-hash")


def test_other_data_under_the_same_flags_is_refused(cfg):
    with pytest.raises(CheckpointError, match=r"--data\.train.*other contents"):
        check_resumable(cfg, _saved(), cfg, "another-hash")


def test_settings_added_later_are_refused_unless_freed(cfg):
    for section in ("mask", "model", "objective", "optim"):
        for field in dataclasses.fields(getattr(cfg, section)):
            saved = change(cfg)  # a copy to tamper with, past any validation
            tampered = dataclasses.replace(getattr(cfg, section))
            object.__setattr__(tampered, field.name, "other")
            object.__setattr__(saved, section, tampered)
            with pytest.raises(CheckpointError, match=field.name.replace("_", "-")):
                check_resumable(saved, _saved(), cfg, "memory-hash")


def test_a_folder_that_is_not_a_checkpoint_is_an_error(tmp_path):
    for uri in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
            resolve_checkpoint(str(uri))


def test_loading_restores_tensors_of_every_dtype(cfg, tmp_path):
    state = new_state(cfg, CPU)
    tensors = {
        "model": {"half": torch.ones(3, dtype=torch.bfloat16), "scalar": torch.tensor(2.5)},
        "optimizer": {},
        "loop": {"bytes": torch.arange(5, dtype=torch.uint8)},
    }
    save_checkpoint(tmp_path, tensors, _saved(), cfg)
    read = load_tensors(tmp_path, "model", 1)
    assert read["half"].dtype == torch.bfloat16
    assert read["scalar"].shape == ()
    assert load_tensors(tmp_path, "optimizer", 1) == {}
    assert state.step == 0
