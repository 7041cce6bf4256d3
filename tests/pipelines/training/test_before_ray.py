"""What a run finds out, and says, before it starts Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pipelines.fake_training import change, tiny_config
from helpers.pipelines.loading import encode, picture, row_of, write_rows
from models.media.fit import Fit
from pipelines.training.launch import complete


@pytest.mark.parametrize(
    ("fit", "told"),
    [
        (None, "is stretched by a factor of 2.00"),  # a new run squashes
        ("crop", "is cropped: 50% of it is not seen"),
        ("whole", None),
    ],
)
def test_a_run_says_what_its_fit_does_to_its_footage(
    fit: Fit | None, told: str | None, tmp_path: Path
) -> None:
    for name, width in (("wide", 64), ("square", 32)):
        pictures = [encode(picture(i, width, 32), "PNG") for i in range(20)]
        write_rows(tmp_path / name, [row_of(data, "") for data in pictures])
    data = {"train": str(tmp_path / "wide"), "mix": (str(tmp_path / "square"),)}
    cfg = change(tiny_config(tmp_path), data=data | {"mix_shares": (0.5,)}, model={"fit": fit})
    notes = complete(cfg, f"{tmp_path}/run").notes
    assert len(notes) == (told is not None)
    for line in notes:
        assert line.startswith("note: --data.train: the pictures")
        assert f"one 64 wide and 32 high (2:1) {told}" in line
        assert "--model.image-size 16x32 (height x width)" in line  # of at most 16 patches
