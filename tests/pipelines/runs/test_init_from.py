"""`--run.init-from` with another image size or clip length, for every objective."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from helpers.pipelines.fake_training import change, run_training, tiny_config
from models.encoders.positions import fit_table, sincos_2d, sincos_3d
from models.image_size import Grid
from pipelines.runs import initial_weights
from pipelines.runs.checkpoints import (
    CheckpointError,
    CheckpointState,
    load_tensors,
    new_objective,
    save_checkpoint,
)
from pipelines.runs.initial_weights import check_initial, grid_of, load_initial

SMALL = {"projector": (32, 16), "slices": 16}
CLIPS = {"encoder": "video_micro", "frames": 4, "tubelet": 2}
RUNS = {
    "ijepa": ({"name": "ijepa"}, {}),
    "ijepa on itself": ({"name": "ijepa", "target": "self"}, {}),
    "regularized": ({"name": "ijepa", "regularize": "context_pooled"}, {}),
    "dmjd": ({"name": "dmjd"}, {}),
    "mae": ({"name": "mae"}, {}),
    "lejepa": ({"name": "lejepa"}, {}),
    "vicreg": ({"name": "vicreg"}, {}),
    "vjepa": ({"name": "vjepa"}, CLIPS),
    "vjepa rotary": ({"name": "vjepa"}, {**CLIPS, "positions": "rope"}),
    "videomae": ({"name": "videomae"}, CLIPS),
    "levjepa": ({"name": "levjepa"}, {**CLIPS, "positions": "rope_released"}),
}
LARGER = {"image_size": 48}
LONGER = {"image_size": 64, "frames": 12}


def _config(folder: Path, name: str):
    objective, model = RUNS[name]
    mask = {"kind": "tube" if objective["name"] == "videomae" else "blocks"}
    objective = {**SMALL, **objective}
    return change(tiny_config(folder), model=model, objective=objective, video_mask=mask)


def _save(folder: Path, cfg, tensors=None) -> str:
    """A checkpoint by two processes: random weights, with fixed tables as the model made them."""
    torch.manual_seed(5)
    weights = tensors or new_objective(cfg).state_dict()
    folder.mkdir(parents=True)
    for rank in range(2):
        state = CheckpointState(step=7, position=56, epoch=1.0, manifest_hash="m", world_size=2)
        save_checkpoint(
            folder, {"model": weights, "optimizer": {}, "loop": {}}, state, cfg, rank=rank
        )
    return str(folder)


def _tables(weights) -> set[str]:
    return {name for name in weights if name.endswith("pos_embed")}


@pytest.mark.parametrize("name", RUNS)
def test_other_grids_change_the_tables_of_positions_and_nothing_else(tmp_path, name):
    cfg = _config(tmp_path, name)
    donor = _save(tmp_path / "donor", cfg)
    saved = load_tensors(Path(donor), "model", 2)
    sizes = LONGER if cfg.modality == "video" else LARGER
    other = change(cfg, model=sizes, run={"init_from": donor, "seed": 9})
    line = check_initial(other)
    assert line is not None
    assert f"trained on {grid_of(cfg)} tokens" in line
    assert f"fitted to the {grid_of(other)} of this run" in line

    torch.manual_seed(9)
    objective = new_objective(other)
    fresh = {n: t.clone() for n, t in objective.state_dict().items()}
    assert donor in load_initial(other, objective)
    loaded = objective.state_dict()
    assert _tables(loaded) == _tables(saved)
    assert bool(_tables(saved)) == (cfg.model.positions == "sincos")
    for key, value in loaded.items():
        assert torch.equal(value, (fresh if key in _tables(saved) else saved)[key]), key
    assert any(
        not torch.equal(fresh[key], saved[key]) for key in saved if key not in _tables(saved)
    )


@pytest.mark.parametrize("name", ["ijepa", "vjepa", "vjepa rotary", "lejepa"])
def test_on_the_same_grid_all_weights_and_features_are_those_of_the_other_run(tmp_path, name):
    cfg = _config(tmp_path, name)
    donor = _save(tmp_path / "donor", cfg)
    other = change(cfg, run={"init_from": donor})
    assert check_initial(other) is None
    torch.manual_seed(5)
    theirs = new_objective(cfg)
    torch.manual_seed(9)
    ours = new_objective(other)
    pixels = torch.randn(2, 3, *([4] if cfg.modality == "video" else []), 32, 32)
    with torch.no_grad():
        assert not torch.equal(ours.feature_encoder(pixels), theirs.feature_encoder(pixels))
        load_initial(other, ours)
        assert torch.equal(ours.feature_encoder(pixels), theirs.feature_encoder(pixels))


def test_a_grid_of_another_shape_with_as_many_tokens_is_another_grid(tmp_path):
    """8 x 2 x 2 and 2 x 4 x 4 tokens have tables of equal shape but different meaning."""
    cfg = change(_config(tmp_path, "vjepa"), model={"image_size": 16, "frames": 16})
    other = change(cfg, model={"image_size": 32, "frames": 4})
    donor = _save(tmp_path / "donor", cfg)
    other = change(other, run={"init_from": donor})
    objective = new_objective(other)
    fresh = objective.encoder.pos_embed.clone()
    load_initial(other, objective)
    assert objective.encoder.pos_embed.shape == new_objective(cfg).encoder.pos_embed.shape
    assert torch.equal(objective.encoder.pos_embed, fresh)
    assert not torch.equal(objective.encoder.pos_embed, new_objective(cfg).encoder.pos_embed)


def test_learned_tables_are_interpolated_everywhere(tmp_path):
    cfg = _config(tmp_path, "ijepa")
    torch.manual_seed(3)
    weights = {n: t.clone() for n, t in new_objective(cfg).state_dict().items()}
    for name in _tables(weights):
        weights[name] = torch.randn_like(weights[name])
    other = change(
        cfg,
        model={"image_size": 64},
        run={"init_from": _save(tmp_path / "donor", cfg, weights)},
    )
    objective = new_objective(other)
    load_initial(other, objective)
    for name in ("encoder.pos_embed", "target_encoder.pos_embed", "predictor.pos_embed"):
        expected = resample_abs_pos_embed(
            weights[name], new_size=[8, 8], old_size=[4, 4], num_prefix_tokens=0
        )
        assert torch.equal(objective.state_dict()[name], expected)


def test_tables_are_interpolated_over_time():
    old, new = Grid(4, 4, 3), Grid(6, 6, 6)
    assert torch.equal(
        fit_table(sincos_3d(24, Grid(4, 4, 3))[None], old, new)[0], sincos_3d(24, Grid(6, 6, 6))
    )
    one = fit_table(sincos_2d(24, 4, 4)[None], Grid(4, 4), Grid(4, 4, 5))  # an image's for clips
    assert torch.equal(one[0], sincos_3d(24, Grid(4, 4, 5)))
    # Learned, and linear in time: the steps between are the means of their neighbours.
    rows = torch.randn(1, 16, 24)
    rising = torch.cat([rows, rows + 1, rows + 2], dim=1)
    longer = fit_table(rising, old, Grid(4, 4, 6)).view(6, 16, 24)
    steps = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0])
    assert torch.allclose(longer, rows + steps[:, None, None], atol=1e-6)
    # Learned in space, the same at all times.
    plane = torch.randn(1, 16, 24)
    wider = fit_table(plane.repeat(1, 3, 1), old, Grid(6, 6, 3)).view(3, 36, 24)
    expected = resample_abs_pos_embed(plane, new_size=[6, 6], old_size=[4, 4], num_prefix_tokens=0)
    assert torch.allclose(wider, expected.expand(3, -1, -1), atol=1e-6)


MISFITS = {
    "--model.patch-size was 8, is 4": {"model": {"patch_size": 4}},
    "--model.encoder was vit_micro32, is vit_tiny32": {"model": {"encoder": "vit_tiny32"}},
    "--model.positions was sincos, is rope": {"model": {"positions": "rope"}},
    "--model.predictor-depth was None, is 1": {"model": {"predictor_depth": 1}},
    "--objective.name was ijepa, is mae": {"objective": {"name": "mae"}},
    "--objective.target was ema, is self": {"objective": {"target": "self"}},
    "--video-mask.blocks was (8, 2), is (8,)": {},
}


@pytest.mark.parametrize("said", MISFITS)
def test_other_shapes_are_refused_from_the_headers_alone(tmp_path, monkeypatch, said):
    cfg = _config(tmp_path, "vjepa" if "video-mask" in said else "ijepa")
    donor = _save(tmp_path / "donor", cfg)
    changes = MISFITS[said] or {
        "video_mask": {"blocks": (8,), "scale": (0.15,), "temporal_scale": (1.0,)}
    }
    other = change(cfg, **changes, run={"init_from": donor})
    with monkeypatch.context() as patch:
        patch.setattr(initial_weights, "load_tensors", lambda *a: pytest.fail("loaded"))
        with pytest.raises(CheckpointError) as error:
            check_initial(other)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"--run.init-from {donor}: ")
    assert "weights do not fit" in lines[0]
    assert said in lines[1]
    assert "leave --run.init-from out" in lines[2]
    with pytest.raises(CheckpointError, match="weights do not fit"):
        load_initial(other, new_objective(other))


def test_a_run_trains_on_at_twice_the_size(tmp_path):
    donor = tiny_config(tmp_path / "donor")
    run_training(donor, tmp_path / "donor" / "ck")
    end = tmp_path / "donor" / "ck" / "checkpoint_00000012"
    larger = change(
        tiny_config(tmp_path, init_from=str(end), steps=12, stop_after=2, log_every=1),
        model={"image_size": 64},
        optim={"lr": 0.0, "start_lr": 0.0, "final_lr": 0.0},
    )
    outcome, said = run_training(larger, tmp_path / "ck")
    assert (outcome.step, outcome.refused) == (2, None)
    assert said[0] == f"starting from the weights of {end} (step 12)"
    theirs = load_tensors(end, "model", 1)
    ours = load_tensors(tmp_path / "ck" / "checkpoint_00000002", "model", 1)
    tables = _tables(theirs)
    for name in [name for name in theirs if not name.startswith("target_encoder.")]:  # EMA goes on
        assert torch.equal(ours[name], theirs[name]) == (name not in tables), name
    assert ours["encoder.pos_embed"].shape == (1, 64, 96)


def test_the_error_about_damaged_weights_names_the_flag(tmp_path):
    cfg = _config(tmp_path, "ijepa")
    donor = Path(_save(tmp_path / "run" / "checkpoint_00000007", cfg))
    share = donor / "model-00001-of-00002.safetensors"
    share.write_bytes(share.read_bytes()[:-1])
    for named in (donor, donor.parent):
        with pytest.raises(CheckpointError, match=r"^--run\.init-from: run ") as error:
            check_initial(change(cfg, run={"init_from": str(named)}))
        assert len(str(error.value).splitlines()) == 3
