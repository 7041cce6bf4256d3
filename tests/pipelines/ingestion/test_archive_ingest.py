"""Whole ingests of archives and tables, without Ray: nothing disappears uncounted."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.pipelines.ingestion import run_quietly, settings
from helpers.pipelines.sources import picture, write, write_tar
from pipelines.dataset.shards import Manifest, read_manifest, read_rows

pytestmark = pytest.mark.usefixtures("in_process")


def ingested(source: Path, **changes: object) -> tuple[Manifest, dict[str, object]]:
    """Ingests `source`; returns the manifest, and class names by the end of the address."""
    out = source.parent / f"{source.name}-out"
    run_quietly(settings(source, out, **changes))
    manifest = read_manifest(out)
    rows = read_rows(out).to_pylist()
    names = [None if row["label"] is None else manifest.classes[row["label"]] for row in rows]
    uris = [row["source_uri"].partition("#")[2] for row in rows]
    return manifest, dict(zip(uris, names, strict=True))


def losses(source: Path) -> list[tuple[str, str]]:
    rows = pq.read_table(source.parent / f"{source.name}-out" / "losses.parquet").to_pylist()
    return [(row["source_uri"].partition("#")[2], row["reason"]) for row in rows]


def messy(tmp_path: Path) -> Path:
    """An archive of GNU tar, appended to, then joined with another one."""
    root = tmp_path / "set"
    for index in range(6):
        write(root / "train" / f"{index}.png", picture(index))
        write(root / "train" / f"{index}.cls", b"%d" % (index % 2))
    write(root / "train" / "again.png", picture(0))
    write(root / "train" / "._0.png", b"\0\5\26\7")
    write(root / "train" / ".DS_Store", b"\0")
    write(root / "train" / "broken.png", picture(9)[:40])
    write(root / "train" / "broken.json", b"{")
    write(root / "train" / "multi.png", picture(10))
    write(root / "train" / "multi.json", b'{"label": [1, 2]}')
    write(root / "train" / "lonely.cls", b"1")
    write(root / "train" / "0.npy", b"\x93NUMPY")
    write(root / "train" / "0.avif", picture(11, "AVIF"))
    write(root / "README", b"read me")
    (root / "latest.png").symlink_to("train/5.png")
    (root / "gone.png").symlink_to("/nowhere/x.png")
    archive = tmp_path / "messy.tar"
    command = ["tar", "-C", str(root), "-cf", str(archive), "--sort=name", "."]
    subprocess.run(command, check=True)
    write(root / "train" / "5.png", picture(50))
    append = ["tar", "-C", str(root), "-rf", str(archive), "./train/5.png", "./train/5.cls"]
    subprocess.run(append, check=True)
    other = write_tar(tmp_path / "other", [("train/0.png", picture(60)), ("train/0.cls", b"1")])
    archive.write_bytes(archive.read_bytes() + other.read_bytes())
    return archive


def test_every_member_ends_in_one_counted_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = messy(tmp_path)
    with tarfile.open(archive, ignore_zeros=True) as tar:
        members = len(tar.getmembers())
    manifest, labels = ingested(archive)
    assert labels == {
        **{f"./train/{index}.png": str(index % 2) for index in range(6)},
        **{"./train/5.png#2": "1", "train/0.png": "1", "./train/multi.png": None},
        "./train/0.avif": "0",
    }
    assert manifest.duplicates == 1
    assert manifest.quarantined == {"truncated": 1, "unreadable": 1}
    assert manifest.losses == {"label_not_understood": 1}
    assert losses(archive) == [("./train/multi.png", "label_not_understood")]
    assert manifest.ignored == {
        **{".npy": 1, "folder": 2, "hidden": 2, "label": 10, "label without image": 1},
        **{"link": 1, "no suffix": 1},
    }
    kept = manifest.num_samples + manifest.duplicates + sum(manifest.quarantined.values())
    assert members == kept + sum(manifest.ignored.values())
    told = capsys.readouterr().out
    assert "label without image" in told
    assert "label_not_understood" in told
    assert "--image-member" in told  # 0.png and 0.avif


def test_a_damaged_tail_costs_only_what_stands_in_it(tmp_path: Path) -> None:
    members = [(f"{i}.cls", b"%d" % i) for i in range(4)]
    members += [(f"{i}.png", picture(i)) for i in range(4)]
    archive = write_tar(tmp_path / "a.tar", members)
    archive.write_bytes(archive.read_bytes()[: 7 * 1024 + 300])
    manifest, labels = ingested(archive)
    assert labels == {f"{i}.png": str(i) for i in range(3)}
    assert manifest.quarantined == {"corrupt_archive": 1}
    assert manifest.ignored == {"label": 3, "label without image": 1}


def test_a_tar_without_images_says_what_it_holds(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", [("a.npy", b"x"), ("b.cls", b"1")])
    with pytest.raises(ValueError, match=r"--source: no image in .*a\.tar, but .*'\.npy': 1"):
        ingested(archive)


def test_labels_far_behind_their_images_reach_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are written out long before the labels at the end of the archive are read."""
    monkeypatch.setattr("pipelines.ingestion.staging.PART_BYTES", 500)
    members = [(f"{i}.png", picture(i)) for i in range(30)]
    members += [(f"{i}.cls", b"class%d" % (i % 3)) for i in range(30)]
    _, labels = ingested(write_tar(tmp_path / "a.tar.gz", members, "w:gz"), row_group_rows=4)
    assert labels == {f"{i}.png": f"class{i % 3}" for i in range(30)}


def test_pandas_frame_with_a_missing_label(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"image": [picture(i) for i in range(8)], "label": [0, 1, None, 1, 0, 1, 0, 1]}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    manifest, labels = ingested(tmp_path / "a.parquet")
    assert list(labels.values()) == ["0", "1", None, "1", "0", "1", "0", "1"]
    assert (manifest.quarantined, manifest.losses) == ({}, {})


@pytest.mark.parametrize(
    ("values", "names", "lost"),
    [
        ([True, False, None, True], ["1", "0", None, "1"], 0),
        ([np.nan, 2.0, 0.0, 1.5], [None, "2", "0", None], 1),
        ([[1], [1, 2], None, []], [None, None, None, None], 3),
        ([{"id": 1}, None, None, None], [None] * 4, 1),
        (pd.Categorical(["cat", "dog", None, "cat"]), ["cat", "dog", None, "cat"], 0),
        (pd.to_datetime(["2026-01-01"] * 4), [None] * 4, 4),
        ([b"cat", b"\xff", None, b"dog"], ["cat", None, None, "dog"], 1),
        (pd.array([1, None, 0, 1], "Int64"), ["1", None, "0", "1"], 0),
        (pd.array(["1", "0", None, "1"], "string"), ["1", "0", None, "1"], 0),
    ],
    ids=["bool", "float", "list", "dict", "categorical", "time", "bytes", "Int64", "string"],
)
def test_a_label_column_never_costs_an_image(
    tmp_path: Path, values: object, names: list[object], lost: int
) -> None:
    frame = pd.DataFrame({"image": [picture(i) for i in range(4)], "label": values})
    frame.to_parquet(tmp_path / "a.parquet")
    manifest, labels = ingested(tmp_path / "a.parquet")
    assert list(labels.values()) == names
    assert sum(manifest.losses.values()) == lost
    assert manifest.quarantined == {}


def declares(path: Path, names: object, labels: list[object], first: int) -> None:
    feature = {"names": names, "_type": "ClassLabel"}
    meta = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    images = [picture(first + place) for place in range(len(labels))]
    table = pa.table({"image": images, "label": labels})
    pq.write_table(table.replace_schema_metadata(meta if names is not None else None), path)


def test_files_that_declare_other_orders_are_brought_together_by_name(tmp_path: Path) -> None:
    source = tmp_path / "set"
    source.mkdir()
    declares(source / "0.parquet", ["cat", "dog"], [0, 1, -1], 0)
    declares(source / "1.parquet", ["dog", "cat", "eel"], [0, 1, 2, 5], 10)
    declares(source / "2.parquet", None, [0], 20)
    declares(source / "3.parquet", None, ["eel", "ant"], 30)
    out = tmp_path / "set-out"
    run_quietly(settings(source, out))
    manifest, rows = read_manifest(out), read_rows(out).to_pylist()
    assert manifest.classes == ("cat", "dog", "eel", "ant")
    named = [None if r["label"] is None else manifest.classes[r["label"]] for r in rows]
    assert named == ["cat", "dog", None, "dog", "cat", "eel", None, None, "eel", "ant"]
    assert manifest.losses == {"label_undeclared": 2}


def test_indices_and_names_of_one_declaration(tmp_path: Path) -> None:
    source = tmp_path / "set"
    source.mkdir()
    declares(source / "0.parquet", ["dog", "cat"], [0, 1], 0)
    declares(source / "1.parquet", None, ["cat", "bee"], 10)
    declares(source / "2.parquet", None, [1], 20)
    out = tmp_path / "set-out"
    run_quietly(settings(source, out))
    assert read_manifest(out).classes == ("dog", "cat", "bee")
    assert read_rows(out)["label"].to_pylist() == [0, 1, 1, 2, 1]


def test_a_class_name_that_is_no_utf8(tmp_path: Path) -> None:
    """A JSON text may hold half a surrogate pair, which Arrow does not take."""
    archive = write_tar(
        tmp_path / "a.tar", [("0.png", picture(0)), ("0.json", rb'{"cls": "a\ud800"}')]
    )
    assert ingested(archive)[1] == {"0.png": r"a\ud800"}
