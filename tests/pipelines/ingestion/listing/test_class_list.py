"""Classes that are given: the same indices in every set, and nothing of another class."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.data.ingest import encoded, noise
from helpers.pipelines.ingestion import run_quietly, settings
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.rows import check_classes
from pipelines.dataset.shards import read_manifest, read_rows
from pipelines.ingestion.listing.class_list import read_classes
from pipelines.ingestion.merging import choose_classes
from pipelines.ingestion.staging import ITEMS_SCHEMA


def write_set(root: Path, classes: dict[str, int], start: int = 0) -> Path:
    """Writes so many images of each class, all of them different."""
    number = start
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            (root / name / f"{number}.png").write_bytes(encoded(noise(number), "PNG"))
            number += 1
    return root


def labels_of(out: Path) -> dict[str, int | None]:
    """Returns the label of each image by its folder's name."""
    rows = read_rows(out).to_pylist()
    return {row["source_uri"].split("/")[-2]: row["label"] for row in rows}


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"cat\ndog\n", ("cat", "dog")),
        (
            "\ufefftench, Tinca tinca\r\nC\u00f4te\r\n\r\n".encode(),
            ("tench, Tinca tinca", "C\u00f4te"),
        ),
        ("cat\ndog".encode("utf-16"), ("cat", "dog")),
        (b'["dog", "cat"]', ("dog", "cat")),
        (b'{"classes": ["b", "a"], "num_samples": 3}', ("b", "a")),
    ],
)
def test_files_of_names(data: bytes, names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(data)
    assert read_classes(str(tmp_path / "classes.txt")) == names


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "names no class"),
        (b"cat\n\ndog\n", r"has an empty line \(2\)"),
        (b"cat\ndog\ncat\n", "names 'cat' twice"),
        (b"[1, 2]", "neither a list of names nor a manifest"),
        (b'{"a": 1}', "neither a list of names nor a manifest"),
        (b"{", "is no JSON"),
    ],
)
def test_what_is_no_list_of_classes_is_said(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"--classes: .*{said}"):
        read_classes(str(tmp_path / "classes.txt"))
    with pytest.raises(ValueError, match=r"--classes: .*gone does not exist"):
        read_classes(str(tmp_path / "gone"))


def test_a_test_set_gets_the_indices_of_its_training_set(in_process: None, tmp_path: Path) -> None:
    train, test = tmp_path / "train-out", tmp_path / "test-out"
    run_quietly(settings(write_set(tmp_path / "train", {"ant": 1, "bee": 1, "cow": 1}), train))
    source = write_set(tmp_path / "test", {"bee": 1, "cow": 1, "dog": 2}, 10)
    run_quietly(settings(source, test))
    with pytest.raises(ValueError, match=r"different classes: ant, dog; .* with --classes"):
        check_classes({"--data": read_manifest(train), "--test": read_manifest(test)})
    cfg = settings(source, test, classes=str(train))
    run_quietly(cfg)
    check_classes({"--data": read_manifest(train), "--test": read_manifest(test)})
    assert labels_of(test) == {"bee": 1, "cow": 2, "dog": None}
    manifest = read_manifest(test)
    assert manifest.losses == {"label_not_in_classes": 2}
    assert manifest.num_samples == 4  # no image is lost for its label
    written = (test / "manifest.json").stat().st_mtime_ns
    run_quietly(cfg)
    assert (test / "manifest.json").stat().st_mtime_ns == written, "up to date"
    (tmp_path / "names.txt").write_text("dog\nbee\n")
    run_quietly(dataclasses.replace(cfg, classes=str(tmp_path / "names.txt")))
    assert labels_of(test) == {"bee": 1, "cow": None, "dog": 0}


def table_of(labels: list[object]) -> list[pa.Table]:
    rows = [
        {
            "label_index": value if isinstance(value, int) else None,
            "label_name": value if isinstance(value, str) else None,
        }
        for value in labels
    ]
    return [pa.Table.from_pylist(rows, ITEMS_SCHEMA)]


@pytest.mark.parametrize(
    ("labels", "declared", "fixed", "indices"),
    [
        ([1, 0, 2, None], (), ("cat", "dog"), [1, 0, None, None]),  # indices of names
        (["dog", 0, "cow"], (), ("cat", "dog"), [1, 0, None]),
        ([3, 7, 0], (), ("3", "7"), [0, 1, None]),  # names that are numbers
        (["cafe\u0301", "\u00e9t\u00e9"], (), ("caf\u00e9", "e\u0301te\u0301"), [0, 1]),  # a Mac's
        ([0, 1, 5], ("dog", "cat"), ("cat", "dog"), [1, 0, None]),  # as the source calls them
    ],
)
def test_integers_among_fixed_classes(
    labels: list[object],
    declared: tuple[str, ...],
    fixed: tuple[str, ...],
    indices: list[int | None],
    in_process: None,
    tmp_path: Path,
) -> None:
    classes = choose_classes(table_of(labels), declared, fixed)
    assert classes.names == fixed
    table = pa.table(
        {
            "image": [encoded(noise(number), "PNG") for number in range(len(labels))],
            "label": [None if value is None else str(value) for value in labels],
        }
    )
    if declared:
        feature = {"names": list(declared), "_type": "ClassLabel"}
        meta = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
        table = table.set_column(1, "label", pa.array(labels, pa.int64()))
        table = table.replace_schema_metadata(meta)
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "names.txt").write_text("\n".join(fixed))
    out = tmp_path / "out"
    run_quietly(settings(tmp_path / "a.parquet", out, classes=str(tmp_path / "names.txt")))
    assert read_rows(out)["label"].to_pylist() == indices


def test_one_large_integer_makes_no_million_classes() -> None:
    assert choose_classes(table_of([999_999, 3, 3]), ()).names == ("3", "999999")
    assert choose_classes(table_of([999_999, 3]), ()).by_name
    assert choose_classes(table_of([21_841]), ()).names[-1] == "21841"  # a part of ImageNet-21k
    assert len(choose_classes(table_of([21_841]), ()).names) == 21_842


def test_classes_are_the_same_however_accents_are_composed(
    in_process: None, tmp_path: Path
) -> None:
    outs = {}
    for flag, name in (("--data", "caf\u00e9"), ("--test", "cafe\u0301")):
        outs[flag] = tmp_path / f"out{flag}"
        run_quietly(settings(write_set(tmp_path / flag, {name: 1, "tea": 1}), outs[flag]))
    manifests = {flag: read_manifest(out) for flag, out in outs.items()}
    assert len({manifest.classes for manifest in manifests.values()}) == 2
    check_classes(manifests)


def test_a_stream_has_no_classes() -> None:
    with pytest.raises(ValueError, match="--classes: goes without --follow"):
        IngestConfig(source="rtsp://x", out="y", follow=True, classes="z")
