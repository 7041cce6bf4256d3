"""Ingest: nothing is lost, the same input gives the same bytes, other people's files stay."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.data.ingest import encoded, noise, start_ingest, write_broken
from helpers.models.image_formats import FORMATS
from helpers.pipelines.ingestion import run_backwards, run_quietly, settings
from models.media.images import decode_image
from pipelines import ingest as ingest_module
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import MANIFEST, hash_bytes, read_manifest, read_rows, verify_shards
from pipelines.ingest import ingest
from pipelines.ingestion.merging import choose_classes, first_occurrences
from pipelines.ingestion.staging import ITEMS_SCHEMA

# -------------------------------------------------------------------------------- merging


def test_first_of_equal_ids_stays() -> None:
    rng = np.random.default_rng(0)
    distinct = rng.integers(0, 256, (50, 16), np.uint8)
    picks = rng.integers(0, 50, 1000)
    keep = first_occurrences(distinct[picks])
    expected = [index == picks.tolist().index(value) for index, value in enumerate(picks.tolist())]
    assert keep.tolist() == expected
    assert first_occurrences(distinct[:1]).tolist() == [True]


@pytest.mark.parametrize(
    ("labels", "declared", "names", "by_name"),
    [
        ([], (), (), False),
        ([None, None], (), (), False),
        ([2, 0, None], (), ("0", "1", "2"), False),
        ([1], ("zebra", "ant"), ("zebra", "ant"), False),
        ([3], ("zebra", "ant"), ("zebra", "ant", "2", "3"), False),
        (["cow", "2", 2], ("zebra", "ant"), ("zebra", "ant", "2", "cow"), False),
        ([999_999], ("zebra", "ant"), ("999999",), True),
        (["caf\u00e9", "cafe\u0301"], (), ("caf\u00e9",), True),
        (["cafe\u0301"], (), ("cafe\u0301",), True),
        (["dog", "cat", None], (), ("cat", "dog"), True),
        (["dog", 3], (), ("3", "dog"), True),
    ],
)
def test_classes(
    labels: list[object], declared: tuple[str, ...], names: tuple[str, ...], by_name: bool
) -> None:
    rows = [
        {
            "label_index": value if isinstance(value, int) else None,
            "label_name": value if isinstance(value, str) else None,
        }
        for value in labels
    ]
    tables = [pa.Table.from_pylist([row], ITEMS_SCHEMA) for row in rows]
    classes = choose_classes(tables, declared)
    assert (classes.names, classes.by_name) == (names, by_name)


# -------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A folder of 40 + 16 good images, 5 of them twice, and 24 broken files; reasons by count."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "class3").mkdir()
    for index in range(40):
        suffix = ("jpeg", "png", "webp")[index % 3]
        path = root / f"class{index % 4}" / f"{index:03d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(noise(index), suffix.upper()))
        if index < 5:
            (root / "class3" / f"again{index}").write_bytes(path.read_bytes())
    for name, data, *_ in FORMATS[1:]:  # the first is noise(0) as PNG, which stands above as JPEG
        (root / name).write_bytes(data)
    return root, write_broken(root / "class1", 24)


@pytest.fixture(scope="module")
def mixed_run(mixed: tuple[Path, dict[str, int]], ray_local: None, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp("out") / "shards"
    run_quietly(settings(mixed[0], out))
    return out


@pytest.mark.ray
def test_every_item_is_kept_a_duplicate_or_in_quarantine(
    mixed: tuple[Path, dict[str, int]], mixed_run: Path
) -> None:
    root, reasons = mixed
    manifest, rows = read_manifest(mixed_run), read_rows(mixed_run)
    good = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "_" not in p.name[3:]}
    good |= {root / name: data for name, data, *_ in FORMATS[1:]}
    distinct = {hash_bytes(data) for data in good.values()}
    assert manifest.quarantined == reasons
    assert manifest.num_samples == rows.num_rows == len(distinct)
    assert manifest.duplicates == len(good) - len(distinct) == 5
    assert set(rows["sample_id"].to_pylist()) == distinct
    assert manifest.num_bytes == sum(map(len, rows["image"].to_pylist()))
    assert len(manifest.shards) > 1
    quarantine = pq.read_table(mixed_run / "quarantine.parquet").to_pylist()
    for row in quarantine:
        kind = Path(row["source_uri"]).name.rpartition("_")[0]
        assert row["detail"]
        assert (kind, row["reason"]) in {
            *(("empty", "empty"), ("text", "not_an_image"), ("cut_jpeg", "truncated")),
            *(("cut_png", "truncated"), ("corrupt_png", "decode_error")),
            *(("bomb", "too_many_pixels"), ("large", "too_many_bytes")),
            ("lost_link", "unreadable"),
        }
    assert len(quarantine) == 24
    assert len({row["source_uri"] for row in quarantine}) == 24


@pytest.mark.ray
def test_rows_say_what_they_hold(mixed: tuple[Path, dict[str, int]], mixed_run: Path) -> None:
    manifest = read_manifest(mixed_run)
    assert manifest.classes == ("class0", "class1", "class2", "class3")
    sums = np.zeros(6)
    for row in read_rows(mixed_run).to_pylist():
        path = Path(row["source_uri"])
        assert hash_bytes(path.read_bytes()) == row["sample_id"]
        label = None if path.parent == mixed[0] else manifest.classes.index(path.parent.name)
        assert row["label"] == label
        values = np.asarray(decode_image(row["image"])).astype(float)
        assert (row["height"], row["width"]) == values.shape[:2]
        expected = np.asarray(decode_image(path.read_bytes())).astype(float)
        assert np.abs(values - expected).mean() < 3
        sums += [*(expected / 255).mean((0, 1)), *((expected / 255) ** 2).mean((0, 1))]
    sums /= manifest.num_samples
    np.testing.assert_allclose(manifest.mean, sums[:3], atol=1e-3)
    np.testing.assert_allclose(manifest.std, np.sqrt(sums[3:] - sums[:3] ** 2), atol=1e-3)


@pytest.mark.ray
def test_same_input_same_bytes_whatever_the_tasks(
    mixed: tuple[Path, dict[str, int]],
    mixed_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingest_module, "_run", run_backwards)
    assert run_quietly(settings(mixed[0], tmp_path / "b")) == (mixed_run / MANIFEST).read_bytes()


@pytest.mark.ray
def test_done_is_done(mixed: tuple[Path, dict[str, int]], mixed_run: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in mixed_run.iterdir()}
    run_quietly(settings(mixed[0], mixed_run))
    assert {p.name: p.stat().st_mtime_ns for p in mixed_run.iterdir()} == before


def test_changed_source_is_ingested_again(
    in_process: None, cifar_sample: Path, tmp_path: Path
) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    paths = sorted((cifar_sample / "test" / "cat").iterdir())
    for path in paths[:40]:
        (source / path.name).write_bytes(path.read_bytes())
    cfg = settings(source, tmp_path / "out")
    run_quietly(cfg)
    (source / paths[40].name).write_bytes(paths[40].read_bytes())
    (source / paths[0].name).unlink()
    (source / paths[1].name).write_bytes(b"broken now")
    run_quietly(cfg)
    rows = read_rows(cfg.out)
    assert {Path(uri).name for uri in rows["source_uri"].to_pylist()} == {
        p.name for p in paths[2:41]
    }
    manifest = read_manifest(cfg.out)
    assert manifest.quarantined == {"not_an_image": 1}
    parts = {path.name for path in Path(cfg.out).glob("part-*")}
    assert parts == {shard.file for shard in manifest.shards}, "old shards must not pile up"


@pytest.mark.parametrize(
    "name",
    [
        "part-00000-6f1c-c000.snappy.parquet",  # Spark
        "part-3f2a9c01b7de-00000.parquet",  # pipelines.embed
        "thesis.tex",
        "manifest.json",  # somebody else's
    ],
)
def test_a_folder_that_holds_something_else_is_refused_untouched(
    name: str, in_process: None, cifar_sample: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"--out: .*{re.escape(name)}"):
        ingest(settings(cifar_sample / "test" / "cat", out))
    assert [path.name for path in out.iterdir()] == [name]


def test_files_that_others_put_beside_our_shards_stay(
    in_process: None, cifar_sample: Path, tmp_path: Path
) -> None:
    cfg = settings(cifar_sample / "test" / "cat", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()  # hidden: nobody's work
    ingest(cfg)
    names = ("part-00000-6f1c-c000.snappy.parquet", "part-3f2a9c01b7de-00000.parquet")
    orphan = tmp_path / "out" / f"part-{16 * 'b'}.parquet"
    for path in [orphan, *(tmp_path / "out" / name for name in names)]:
        path.touch()
    ingest(dataclasses.replace(cfg, row_group_rows=16))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left >= {".DS_Store", *names}
    assert orphan.name not in left


def test_nothing_good_is_an_error_and_no_data_set(in_process: None, tmp_path: Path) -> None:
    write_broken(tmp_path / "raw", 8)
    cfg = settings(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(ValueError, match=r"not one good image among 8: \{'decode_error': 1"):
        ingest(cfg)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert pq.read_table(tmp_path / "out" / "quarantine.parquet").num_rows == 8


@pytest.mark.ray
def test_tars_and_parquet_give_the_same_data(
    ray_local: None, cifar_sample: Path, tmp_path: Path
) -> None:
    paths = sorted(cifar_sample.glob("test/*/*.png"))[::10]
    rows = [
        {"image": {"bytes": p.read_bytes(), "path": p.name}, "label": p.parent.name} for p in paths
    ]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"image": None, "label": None}]), tmp_path / "a.parquet"
    )
    (tmp_path / "tars").mkdir()
    for half in (0, 1):
        with tarfile.open(tmp_path / "tars" / f"{half}.tar", "w") as tar:
            for row in rows[half::2]:
                name = row["image"]["path"].removesuffix(".png")  # type: ignore[index,call-overload]
                data = {
                    "png": row["image"]["bytes"],
                    "json": json.dumps({"label": row["label"]}).encode(),
                }  # type: ignore[index,call-overload]
                for suffix, content in data.items():
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    tables = []
    for source in ("a.parquet", "tars"):
        cfg = settings(tmp_path / source, tmp_path / f"{source}-out")
        run_quietly(cfg)
        tables.append(read_rows(cfg.out).drop_columns("source_uri").sort_by("sample_id"))
        assert len(read_manifest(cfg.out).classes) == 10
    assert tables[0].num_rows == len(paths)
    assert tables[0].equals(tables[1])
    assert read_manifest(tmp_path / "a.parquet-out").quarantined == {"missing_image": 1}


def test_s3_to_s3(
    in_process: None,
    mixed: tuple[Path, dict[str, int]],
    s3: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its command, as a job of a cluster: test_cluster.py."""
    import fsspec

    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    count = 0
    for path in mixed[0].rglob("*"):
        if path.is_file() and path.stat().st_size < 10**6:
            fs.pipe_file(f"bucket/raw/{path.relative_to(mixed[0])}", path.read_bytes())
            count += 1
    source, out = "s3://bucket/raw", "s3://bucket/out"
    ingest(IngestConfig(source=source, out=out))
    manifest = verify_shards(out)
    total = manifest.num_samples + manifest.duplicates + sum(manifest.quarantined.values())
    assert total == count
    assert not fs.exists("bucket/out/_staging")
    uris = read_rows(out)["source_uri"].to_pylist()
    assert all(uri.startswith("s3://bucket/raw/") for uri in uris)


def test_command_line_reports_errors_without_a_traceback(tmp_path: Path) -> None:
    process = start_ingest(tmp_path / "nothing", tmp_path / "out", tmp_path / "log")
    assert process.wait() == 1
    text = (tmp_path / "log").read_text()
    assert re.search("--source: .*nothing does not exist", text)
    assert "Traceback" not in text
