"""The masks in a report are those that training draws, of the tokens that its samples have.

B samples, K context tokens, M target blocks, T target tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from helpers.pipelines.evaluation import small_encoder
from helpers.pipelines.loading import encode, picture, row_of, write_rows
from models.image_size import Grid
from models.media.fit import Fit
from pipelines.config.data import DataConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.evaluation.features import preprocessing_of
from pipelines.evaluation.report import samples as report
from pipelines.evaluation.subject import Subject
from pipelines.loading.loader import make_reader
from pipelines.loading.plan import Piece
from pipelines.loading.read_tasks import read_piece

SIZES = ((64, 32), (32, 64), (40, 40), (96, 40))
LEFT = (0.0, 0.0, 0.25, 1.0)
"""The first of four columns, of a picture that is not cropped."""


def settings(folder: Path, fit: Fit, exclude: tuple[Any, ...]) -> PretrainConfig:
    """A run whose crops are all that the fit shows, so that training sees what reports draw."""
    pictures = [encode(picture(i, *SIZES[i % len(SIZES)]), "PNG") for i in range(40)]
    data = write_rows(folder, [row_of(data, "", 0) for data in pictures])
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    return PretrainConfig(
        data=DataConfig(train=data, batch_size=16, lanes=2, shuffle_window=9, **whole),
        model=ModelConfig(
            encoder="vit_micro32", image_size=32, patch_size=8, fit=fit, exclude=exclude
        ),
    )


def trained(cfg: PretrainConfig) -> pa.Table:
    """Rows of the run's first batch, with the masks that training gives them."""
    reader = make_reader(cfg, 0, 1)
    return pa.concat_tables(read_piece(reader, Piece(epoch=0, window=0, start=0, stop=1, step=0)))


def drawn(
    cfg: PretrainConfig, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[dict[str, np.ndarray]], list[list[np.ndarray]]]:
    """The masks of each sample that the report draws, and its pictures."""
    ids: list[dict[str, np.ndarray]] = []
    shown: list[np.ndarray] = []
    masked = report._masked

    def watched(sample: Any, masks: Any, grid: Grid, encoder: Any) -> Any:
        ids.append(masks)
        return masked(sample, masks, grid, encoder)

    monkeypatch.setattr(report, "_masked", watched)
    monkeypatch.setattr(report, "picture_uri", lambda pixels: shown.append(pixels) or "")
    # What is evaluated leaves out something else; the masks are those of training.
    other = dataclasses.replace(preprocessing_of(cfg.model), exclude=((0.0, 0.75, 1.0, 1.0),))
    found = report.masks(Subject(small_encoder(), other, {}, config=cfg), rows)
    each = len(found[0])
    return ids, [shown[i : i + each] for i in range(0, len(shown), each)]


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "whole"])
@pytest.mark.parametrize("exclude", [(), (LEFT,)])
def test_masks_are_those_of_training(
    fit: Fit, exclude: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(tmp_path, fit, exclude)
    rows = trained(cfg)
    ids, pictures = drawn(cfg, rows, monkeypatch)
    assert len(ids) == len(pictures) == report.MASKED
    columns = {"context_ids", "target_ids"}
    for row, mine, triple in zip(rows.to_pylist(), ids, pictures, strict=False):
        assert {name: values.flatten().tolist() for name, values in mine.items()} == {
            name: row[name] for name in columns
        }
        grid = row.get("grid") or [4, 4]
        assert all(p.shape == (8 * grid[0], 8 * grid[1], 3) for p in triple)
        kept = row.get("kept_ids") or range(16)
        for number in range(grid[0] * grid[1]):
            top, left = 8 * (number // grid[1]), 8 * (number % grid[1])
            black = [not p[top : top + 8, left : left + 8].any() for p in triple]
            assert black == [number not in kept] * 3
    left_out = [len(row.get("kept_ids") or range(16)) for row in rows.to_pylist()]
    assert (min(left_out) < 16) == (bool(exclude) or fit == "whole")  # else there is nothing to see


def test_other_regions_would_give_other_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: masks of a run that leaves nothing out are not those of one that does."""
    cfg = settings(tmp_path, "squash", (LEFT,))
    whole = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, exclude=()))
    with monkeypatch.context() as patch:
        ids, _ = drawn(whole, trained(cfg), patch)
    column = {0, 4, 8, 12}
    assert any(column & set(np.ravel(m["context_ids"]).tolist()) for m in ids)
    ids, _ = drawn(cfg, trained(cfg), monkeypatch)
    assert not any(column & set(np.ravel(values).tolist()) for m in ids for values in m.values())


def test_the_report_says_on_what_masks_are_drawn(tmp_path: Path) -> None:
    assert "black" in report.mask_note(settings(tmp_path / "a", "squash", (LEFT,)))
    assert report.mask_note(settings(tmp_path / "b", "squash", ())).endswith("own settings")
