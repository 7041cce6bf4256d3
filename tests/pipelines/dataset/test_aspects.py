"""What is said of pictures whose aspect is not the encoder's: once, with figures and a way out."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from helpers.pipelines.loading import write_shards
from models.media.fit import Fit
from pipelines.dataset import aspects
from pipelines.dataset.aspects import aspect_text, fit_notes, ingest_note, read_aspects
from pipelines.dataset.shards import IMAGE_SCHEMA, Manifest, hash_bytes, read_manifest

WIDE, TALL, SQUARE = (720, 1280), (1280, 720), (100, 100)


def shards(folder: Path, *sizes: tuple[int, int]) -> tuple[str, Manifest]:
    """Shards of pictures of these heights and widths; no byte of a picture is ever read."""
    rows = [
        {
            "sample_id": hash_bytes(b"%d" % number),
            "image": b"no picture",
            "height": high,
            "width": wide,
            "label": None,
            "source_uri": str(number),
        }
        for number, (high, wide) in enumerate(sizes)
    ]
    uri = write_shards(folder, pa.Table.from_pylist(rows, IMAGE_SCHEMA), 40, 4)
    return uri, read_manifest(uri)


@pytest.mark.parametrize(
    ("fit", "told"),
    [
        ("crop", "one 1280 wide and 720 high (16:9) is cropped: 44% of it is not seen"),
        ("pad", "(16:9) is padded: 44% of the input are plain bars"),
        ("squash", "(16:9) is stretched by a factor of 1.78"),
    ],
)
def test_a_fit_that_changes_pictures_is_told_with_its_flag(
    fit: Fit, told: str, tmp_path: Path
) -> None:
    one = ("--data.train", *shards(tmp_path, *[WIDE] * 10))
    (line,) = fit_notes([one], fit, 224, 16)
    assert told in line
    assert line.startswith("note: --data.train: the pictures have another aspect")
    assert "224 wide and 224 high" in line
    assert "\n" not in line
    # 10 x 18 patches are within the 196 of the square, and taking the advice ends the note.
    assert "--model.image-size 160x288" in line
    assert fit_notes([one], fit, (160, 288), 16) == []
    (line,) = fit_notes([one], fit, 224)
    assert "--model.fit and --model.image-size of pretrain decide" in line


def test_nothing_is_said_where_aspects_agree_or_pictures_keep_theirs(tmp_path: Path) -> None:
    near = shards(tmp_path / "near", (100, 104), SQUARE)
    assert fit_notes([("--data", *near)], "crop", 224) == []
    assert ingest_note(read_aspects(*near)) is None
    far = shards(tmp_path / "far", (100, 106))  # over 5%
    assert fit_notes([("--data", *far)], "whole", 224) == []
    assert len(fit_notes([("--data", *far)], "crop", 224)) == 1
    assert ingest_note(read_aspects(*far)) is not None


def test_sets_of_which_the_same_is_said_share_a_line(tmp_path: Path) -> None:
    names = {"a": (WIDE,), "b": (WIDE,), "c": (SQUARE,), "d": (TALL,)}
    sets = [(f"--{name}", *shards(tmp_path / name, *sizes)) for name, sizes in names.items()]
    first, second = fit_notes(sets, "crop", 224)
    assert first.startswith("note: --a, --b: ")
    assert second.startswith("note: --d: ")


def test_pictures_of_many_aspects_get_other_advice(tmp_path: Path) -> None:
    one = shards(tmp_path, *[SQUARE, WIDE, TALL, WIDE] * 5)
    (line,) = fit_notes([("--data.train", *one)], "crop", 224, 16)
    assert "75% of the pictures have another aspect" in line
    assert "--model.image-size" not in line
    assert "whole also keeps its aspect" in line
    found = read_aspects(*one)
    assert not found.uniform
    assert str(found) == "100x100 to 1280x1280, median 1:1"
    assert "--model.image-size" not in ingest_note(found)


def test_ingest_says_what_a_square_crop_would_lose(tmp_path: Path) -> None:
    found = read_aspects(*shards(tmp_path, *[WIDE] * 9))
    line = ingest_note(found)
    assert "44% of a picture 1280 wide and 720 high (16:9)" in line
    assert "--model.fit crop" in line
    assert "--model.image-size 160x288" in line
    assert str(found) == "1280x720 (16:9)"


def test_few_row_groups_spread_over_the_set_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set whose second half has another aspect is not judged by its beginning."""
    one = shards(tmp_path, *[SQUARE] * 80, *[WIDE] * 80)
    reads, read = [], aspects.read_row_group
    monkeypatch.setattr(
        aspects, "read_row_group", lambda *given: reads.append(given) or read(*given)
    )
    assert read_aspects(*one).other_than(224) == 0.5
    assert len(reads) == aspects.MOST_GROUPS < len(one[1].row_groups())
    assert {given[4][0] for given in reads} == {"height"}
    assert len(set(map(str, reads))) == aspects.MOST_GROUPS


@pytest.mark.parametrize(
    ("size", "text"),
    [((720, 1280), "16:9"), ((480, 640), "4:3"), ((1280, 720), "9:16"), ((518, 1000), "1.93:1")],
)
def test_aspects_are_written_width_by_height(size: tuple[int, int], text: str) -> None:
    assert aspect_text(*size) == text
