"""Sets on which accuracies mean nothing are told, sets as they should be are not."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from helpers.models.picture_files import encode
from helpers.pipelines.evaluation import PREP, Shards, small_encoder
from helpers.pipelines.ingestion import run_quietly, settings
from models.artifacts.artifact import save_artifact
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.shards import encode_table
from pipelines.evaluate import evaluate
from pipelines.evaluation.validity import SetFacts, validity_warnings

CLASSES = ["cat", "dog", "emu"]


def facts(labels: list[int], first: int = 0, **changes: object) -> SetFacts:
    """Samples numbered from `first` on."""
    ids = np.zeros((len(labels), 16), np.uint8)
    ids[:, 15] = np.arange(first, first + len(labels))
    base = SetFacts(manifest_hash=f"set {first}", labels_N=np.array(labels), ids_N16=ids)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


DATA = facts([0, 1, 2, 0, 1, 2])


def told(test: SetFacts, data: SetFacts = DATA, **more: SetFacts) -> list[str]:
    return validity_warnings({"--data": data, "--test": test, **more}, CLASSES)


def test_sets_as_they_should_be_are_not_spoken_of() -> None:
    assert told(facts([2, 1, 0, 1], 100)) == []
    assert told(facts([1, 0], 100)) == []  # a small test set need not have every class
    assert told(facts([0, 1, 2], 100), **{"--shift-test": facts([0, 1, 2], 200)}) == []


def test_one_class_only() -> None:
    both = told(facts([1, 1], 100), facts([1, 1, 1, 1]))
    assert [text.partition(" samples")[0] for text in both] == ["--data: all 4", "--test: all 2"]
    assert "'dog'" in both[0]
    assert "the folder that it lies in" in both[0]
    (only_test,) = told(facts([0, 0, 0], 100))
    assert only_test.startswith("--test: all 3 samples are of one class, 'cat'")


def test_samples_in_both_sets_are_counted() -> None:
    (some,) = told(facts([2, 0, 1, 2], 5))  # 5 is the last of --data
    assert some.startswith("--test: 1 of 4 samples (25.0%) are also in --data")
    (same,) = told(DATA)
    assert same.startswith("--test: the same set as --data")
    (shifted,) = told(facts([0, 1], 100), **{"--shift-test": facts([1, 2, 0], 3)})
    assert shifted.startswith("--shift-test: 3 of 3 samples (100.0%) are also in --data")


def test_classes_that_are_not_learned() -> None:
    lacking = facts([0, 1, 0, 1])
    absent, wrong = told(facts([0, 2, 2, 1], 100), lacking)
    assert absent.startswith("--data: 1 of 3 classes have no sample (emu)")
    assert wrong.startswith("--test: 2 of 4 samples (50.0%) are of classes without a sample")
    assert "(emu)" in wrong
    few, *_ = told(facts([0, 1], 100), facts([0, 1]))
    assert few == "--data: 2 labelled samples for 3 classes"
    many = validity_warnings({"--data": facts([0, 1] * 20)}, [f"c{i}" for i in range(20)])
    assert "18 of 20 classes" in many[0]
    assert "c7, ..." in many[0]


def test_samples_without_a_label_are_counted() -> None:
    (text,) = told(facts([0, 1, 2], 100, unlabelled=1))
    assert text == "--test: 1 of 4 samples have no label and are left out"


@pytest.fixture
def artifact(tmp_path: Path) -> str:
    save_artifact(tmp_path / "artifact", small_encoder(), PREP, {})
    return str(tmp_path / "artifact")


def pictures(folder: Path, classes: str, first: int) -> Path:
    """Four pictures a class, none like another."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(4):
            colour = (first + 4 * number + k, 50 * number, 9)
            data = encode(Image.new("RGB", (32, 32), colour), "PNG")
            (folder / name / f"{k}.png").write_bytes(data)
    return folder


def evaluated(artifact: str, data: Path, test: Path, out: Path) -> tuple[dict, str]:  # type: ignore[type-arg]
    shown = io.StringIO()
    cfg = EvaluateConfig(
        checkpoint=artifact, data=str(data), test=str(test), out=str(out), probe_epochs=1
    )
    results = evaluate(cfg, console=Console(file=shown, width=200))
    assert json.loads((out / "results.json").read_text())["warnings"] == results["warnings"]
    return results, shown.getvalue()


def test_a_job_tells_on_the_terminal_in_the_results_and_in_the_report(
    in_process: None, artifact: str, tmp_path: Path
) -> None:
    for name, classes, first in (("train", "abc", 0), ("test", "abc", 100), ("images", "i", 0)):
        run_quietly(settings(pictures(tmp_path / name, classes, first), tmp_path / f"{name}-set"))
    train, test, one = (tmp_path / f"{name}-set" for name in ("train", "test", "images"))
    results, shown = evaluated(artifact, train, test, tmp_path / "clean")
    assert results["warnings"] == []
    assert "warning" not in shown
    assert 'class="warnings"' not in (tmp_path / "clean" / "report.html").read_text()
    for data, other, words in (
        (train, train, ["--test: the same set as --data"]),
        (one, one, ["--data: all 4 samples", "--test: the same set", "--test: all 4 samples"]),
    ):
        out = tmp_path / f"{data.name}-report"
        results, shown = evaluated(artifact, data, other, out)
        report = (out / "report.html").read_text().partition('class="warnings"')[2]
        assert len(results["warnings"]) == len(words)
        for text, start in zip(results["warnings"], words, strict=True):
            assert text.startswith(start)
            assert f"warning: {text}" in " ".join(shown.split())
            assert start in report
    with pytest.raises(ValueError, match="no sample that is asked for has a label"):
        evaluated(artifact, train, _unlabelled(test), tmp_path / "none")


def _unlabelled(shards: Path) -> Path:
    """A copy of the set with its classes, but no label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    copy = Path(shutil.copytree(shards, shards.with_name("copy")))
    for file in copy.glob("part-*.parquet"):
        table = pq.read_table(file)
        at = table.column_names.index("label")
        table = table.set_column(at, "label", pa.nulls(table.num_rows, pa.int32()))
        file.write_bytes(encode_table(table, 8))
    return copy


def test_the_cifar_sample_is_as_it_should_be(
    cifar_shards: Shards, artifact: str, tmp_path: Path
) -> None:
    train, test = map(Path, cifar_shards)
    assert evaluated(artifact, train, test, tmp_path / "out")[0]["warnings"] == []
