"""The anchor to an earlier encoder's features: what it adds, and that runs with it resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.pipelines.fake_training import (
    FolderStore,
    assert_bitwise,
    change,
    end_of,
    memory_batches,
    tiny_config,
)
from helpers.pipelines.run_folders import train_run
from pipelines.config.data import DataConfig
from pipelines.config.train import AnchorConfig, PretrainConfig
from pipelines.evaluation.drift import feature_drift
from pipelines.runs.anchor import Anchored
from pipelines.runs.checkpoints import load_encoder, load_objective, new_objective
from pipelines.training.contract import DataSource, Worker
from pipelines.training.trainer import train

MIX = {"mix": ("old",), "mix_shares": (0.5,)}
CHECKPOINT = "checkpoint_00000012"


def batches(cfg, **arguments):
    """Every lane's four rows: two new ones, then two old ones."""
    for batch in memory_batches(cfg, **arguments):
        yield batch | {"sets": torch.tensor([0, 0, 1, 1]).repeat(len(batch["images"]) // 4)}


SETS = DataSource(batches, 5, "memory-hash")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> str:
    storage = tmp_path_factory.mktemp("runs")
    train_run(tiny_config(storage, name="old"))
    return f"{storage}/old/{CHECKPOINT}"


def anchored_run(storage: Path, old: str, weight: float, **run: object) -> PretrainConfig:
    cfg = change(tiny_config(storage, init_from=old, **run), data=MIX)
    return change(cfg, anchor={"weight": weight, "checkpoint": old}, optim={"lr": 3e-3})


def test_only_old_rows_pull_and_names_of_weights_stay(old: str) -> None:
    encoder, cfg, _ = load_encoder(old)
    objective, _, _ = load_objective(old)
    made = Anchored(objective, encoder, 2.0)
    assert made.state_dict().keys() == new_objective(cfg).state_dict().keys()
    batch = next(batches(cfg, rank=0, world_size=1, start_step=0, end_step=1))
    plain, found = objective(batch).loss, made(batch)
    expected = plain * (1 + 2 * found.metrics["anchor"])
    torch.testing.assert_close(found.loss, expected)
    new = batch["sets"] == 0
    pixels = batch["images"].clone()
    pixels[new] = 255 - pixels[new]
    assert made(batch | {"images": pixels}).metrics["anchor"] == found.metrics["anchor"]
    pixels[~new] = 255 - pixels[~new]
    assert made(batch | {"images": pixels}).metrics["anchor"] != found.metrics["anchor"]


def test_tokens_that_are_left_out_are_not_compared(old: str) -> None:
    encoder, cfg, _ = load_encoder(old)
    made = Anchored(load_objective(old)[0], encoder, 1.0)
    batch = next(batches(cfg, rank=0, world_size=1, start_step=0, end_step=1))
    rows = {name: batch[name] for name in ("images", "sets")}

    def kept(ids: list[int]) -> dict[str, torch.Tensor]:
        count = len(batch["images"])
        ids_BK = torch.tensor(ids)[None].expand(count, -1)
        valid_BK = torch.ones_like(ids_BK, dtype=torch.bool)
        return {"grids": torch.tensor([[4, 4]]).expand(count, 2), "kept_ids": ids_BK,
                "kept_valid": valid_BK}  # fmt: skip

    whole = made._distance(rows)
    torch.testing.assert_close(made._distance(rows | kept([*range(16)])), whole)
    part = made._distance(rows | kept([0, 1, 4, 5]))
    covered = batch["images"].clone()
    covered[:, :, :, 16:] = 0  # the right half, of which no token is kept
    hidden = made._distance(rows | {"images": covered} | kept([0, 1, 4, 5]))
    torch.testing.assert_close(hidden, part)


def test_an_encoder_that_has_not_moved_is_not_pulled(tmp_path: Path) -> None:
    cfg = change(tiny_config(tmp_path), objective={"name": "mae"})
    objective = new_objective(cfg)
    other = new_objective(cfg)
    other.load_state_dict(objective.state_dict())
    made = Anchored(objective, other.feature_encoder, 1.0)  # type: ignore[arg-type]
    batch = next(batches(cfg, rank=0, world_size=1, start_step=0, end_step=1))
    assert made(batch).metrics["anchor"] == 0


def test_the_anchor_holds_features_and_a_resumed_run_is_the_same(old: str, tmp_path: Path) -> None:
    before = load_encoder(old)[0]
    cosines = {}
    for weight in (0.0, 10.0):
        cfg = anchored_run(tmp_path, old, weight, name=f"w{weight:g}")
        train(cfg, Worker(), SETS, FolderStore(tmp_path / cfg.run.name), print)
        after = load_encoder(f"{tmp_path}/{cfg.run.name}/{CHECKPOINT}")[0]
        images = next(memory_batches(cfg, rank=0, world_size=1, start_step=0, end_step=1))["images"]
        with torch.no_grad():
            pooled = [e(images / 255.0).mean(1) for e in (before, after)]
        cosines[weight] = feature_drift(*pooled)["cosine"]
    assert cosines[10.0] > cosines[0.0]
    for end in (4, None):
        cfg = anchored_run(tmp_path, old, 10.0, name="parts", stop_after=end)
        train(cfg, Worker(), SETS, FolderStore(tmp_path / "parts"), print)
    assert_bitwise(end_of(tmp_path / "parts"), end_of(tmp_path / "w10"))


def test_what_an_anchor_needs(old: str, tmp_path: Path) -> None:
    anchor = AnchorConfig(weight=1.0, checkpoint=old)
    with pytest.raises(ValueError, match=r"--anchor\.weight: needs old footage"):
        PretrainConfig(anchor=anchor)
    with pytest.raises(ValueError, match=r"--anchor\.checkpoint: goes with --anchor\.weight"):
        PretrainConfig(data=DataConfig(**MIX), anchor=AnchorConfig(weight=1.0))
    cfg = anchored_run(tmp_path, old, 1.0)
    with pytest.raises(ValueError, match=r"--run\.accumulate: workers x accumulate \(4\)"):
        change(cfg, run={"accumulate": 4})
    larger = change(cfg, model={"image_size": 64}, run={"init_from": None})
    outcome = train(larger, Worker(), SETS, FolderStore(tmp_path / "x"), print)
    assert "--anchor.checkpoint" in (outcome.refused or "")
