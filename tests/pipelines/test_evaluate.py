"""The evaluation job, its report page and other evaluations beside it, on real images."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from helpers.pipelines.evaluation import PREP, Shards, small_encoder
from models.artifacts.artifact import save_artifact
from models.encoders.vit import VisionTransformer
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.rows import load_labelled, table_labels
from pipelines.dataset.shards import read_manifest
from pipelines.evaluate import evaluate
from pipelines.evaluation import input_sets
from pipelines.evaluation.features import (
    compute_features,
    decode_batches,
    encoder_features,
    pixel_features,
)
from pipelines.evaluation.probe_sets import probe_set
from pipelines.evaluation.probes.knn import knn_accuracy
from pipelines.evaluation.probes.probe import ProbeTask
from pipelines.evaluation.probes.registry import run_probes
from pipelines.evaluation.report.comparison import read_compared
from pipelines.evaluation.report.page import write_report
from pipelines.evaluation.report.tables import comparison_table
from pipelines.evaluation.subject import load_subject, random_init


@pytest.fixture
def encoder() -> VisionTransformer:
    return small_encoder()


def test_random_init_follows_its_seed_and_leaves_the_global_one(
    encoder: VisionTransformer,
) -> None:
    before = torch.get_rng_state()
    first, again, other = (random_init(encoder, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [m.blocks[0].attn.qkv.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_collapsed_encoder_scores_chance_and_shows_in_rankme(
    cifar_shards: Shards, encoder: VisionTransformer
) -> None:
    """The negative control: every image one feature."""
    with torch.no_grad():
        encoder.norm.weight.zero_()
        encoder.norm.bias.fill_(1.0)
    sets = []
    for uri in cifar_shards:
        features = {"encoder": encoder_features(encoder, PREP)}
        sets.append(probe_set(uri, features, PREP, batch_size=64))
    cfg = EvaluateConfig(checkpoint="", data="", test="", probe_epochs=2)
    row = run_probes(ProbeTask(row="encoder", train=sets[0], test=sets[1], cfg=cfg, heads=3))
    assert row["knn"] < 0.2
    assert row["linear"]["accuracy"] < 0.2
    assert row["rankme"] < 1.01


@pytest.fixture(scope="module")
def evaluation(
    cifar_shards: Shards, small_checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("evaluation")
    cfg = EvaluateConfig(
        checkpoint=small_checkpoint,
        data=cifar_shards[0],
        test=cifar_shards[1],
        out=str(out),
        probe_epochs=3,
    )
    other = tmp_path_factory.mktemp("other")
    (other / "results.json").write_text(json.dumps(_other_results(cfg)))
    return evaluate(dataclasses.replace(cfg, compare=(str(other),))), out


def _other_results(cfg: EvaluateConfig) -> dict:
    """Made-up results of a run named "rival", by `cfg`'s settings on `cfg`'s data."""
    few = {"mean": 0.1, "std": 0.01, "labelled": 10, "draws": 5}
    row = {"knn": 0.987, "linear": {"accuracy": 0.876}, "few_shot_1pct": few, "few_shot_10": few}
    hashes = {name: read_manifest(getattr(cfg, name)).manifest_hash for name in ("data", "test")}
    return {
        "rows": {
            "encoder": {**row, "width": 48, "rankme": 12.3},
            "random_init": {**row, "knn": 0.5, "width": 48, "rankme": 3.4},
        },
        "provenance": {"run": "rival", "step": 7},
        "settings": dataclasses.asdict(cfg),
        "data": {name: {"manifest_hash": value} for name, value in hashes.items()},
    }


def test_results_hold_every_number_beside_both_baselines(evaluation: tuple[dict, Path]) -> None:
    results, out = evaluation
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["rows"]) == ["encoder", "random_init", "raw_pixels"]
    for row in results["rows"].values():
        assert 0 < row["knn"] < 1
        assert 0 < row["linear"]["accuracy"] < 1
        assert row["few_shot_10"]["labelled"] == 100
        assert row["few_shot_1pct"]["labelled"] == 10
    assert results["rows"]["encoder"]["width"] == 96
    assert 1 <= results["rows"]["encoder"]["rankme"] <= 96
    assert results["provenance"]["step"] == 30
    assert results["data"]["test"]["images"] == 200


def test_the_rows_are_what_they_say(
    evaluation: tuple[dict, Path], cifar_shards: Shards, small_checkpoint: str
) -> None:
    """kNN of the table, recomputed from the checkpoint and from pixels by hand."""
    results, _ = evaluation
    subject = load_subject(small_checkpoint)
    train, test = (load_labelled(uri) for uri in cifar_shards)
    for row, features in (
        ("encoder", encoder_features(subject.encoder, subject.preprocessing)),
        ("raw_pixels", pixel_features(subject.preprocessing)),
    ):
        bank, query = (
            compute_features({"f": features}, decode_batches(t, subject.preprocessing, 64))["f"]
            for t in (train, test)
        )
        expected = knn_accuracy(bank, table_labels(train), query, table_labels(test))
        assert results["rows"][row]["knn"] == pytest.approx(expected, abs=0.011)
    assert results["rows"]["encoder"]["knn"] != results["rows"]["random_init"]["knn"]


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href") and v]


def test_the_report_is_self_contained_and_complete(evaluation: tuple[dict, Path]) -> None:
    results, out = evaluation
    html = (out / "report.html").read_text()
    page = _Links()
    page.feed(html)
    assert len(page.sources) >= 10 * 7 + 8 * 3 + 8 * 3  # neighbours, PCA, masks
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"@import|url\(|<script|<link", html)
    assert page.tags.count("svg") == 3  # loss, RankMe, kNN of metrics.jsonl
    assert f"{100 * results['rows']['raw_pixels']['knn']:.1f}" in html
    assert "vit_micro32" in html  # the training configuration


def test_other_evaluations_stand_beside_in_report_and_table(
    evaluation: tuple[dict, Path], cifar_shards: Shards
) -> None:
    results, out = evaluation
    html = (out / "report.html").read_text()
    table = html.partition("<h2>Comparison</h2>")[2].partition("</section>")[0]
    names = re.findall(r"<tr><td>([^<]*)</td>", table)
    assert names == ["small, step 30", "rival, step 7", "random init", "raw pixels"]
    assert re.search(r'class="best">98\.7', table)  # the rival's kNN
    assert f"{100 * results['rows']['encoder']['knn']:.1f}" in table
    cfg = EvaluateConfig(checkpoint="", data=cifar_shards[0], test=cifar_shards[1])
    other = _other_results(cfg)
    shown = io.StringIO()
    Console(file=shown, width=120).print(comparison_table(results, [other, other]))
    lines = shown.getvalue()
    assert re.search(r"rival, step 7 .* 98\.7 .* \+48\.7 .* 87\.6 .* 12\.3 of 48", lines)
    assert "rival, step 7 (2)" in lines


def test_an_evaluation_that_does_not_compare_is_refused(
    cifar_shards: Shards, tmp_path: Path
) -> None:
    cfg = EvaluateConfig(checkpoint="", data=cifar_shards[0], test=cifar_shards[1])
    manifests = [read_manifest(uri) for uri in cifar_shards]
    file = tmp_path / "results.json"
    cfg = dataclasses.replace(cfg, compare=(str(file),))

    def read(results: dict) -> list[dict]:
        file.write_text(json.dumps(results))
        return read_compared(cfg, manifests)

    with pytest.raises(ValueError, match=r"--compare .*: no results\.json there"):
        read_compared(cfg, manifests)
    good = json.loads(json.dumps(_other_results(cfg)))
    assert read(good) == [good]
    with pytest.raises(ValueError, match="on other data than --shift-test"):
        read_compared(cfg, [*manifests, manifests[1]])
    with pytest.raises(ValueError, match=r"no results of pipelines\.evaluate"):
        read({"rows": {}})
    with pytest.raises(ValueError, match="with --knn-k 5, not 20"):
        read(good | {"settings": good["settings"] | {"knn_k": 5}})
    with pytest.raises(ValueError, match="other data than --test"):
        read(good | {"data": good["data"] | {"test": {"manifest_hash": "x"}}})


def test_class_names_cannot_inject_markup(
    evaluation: tuple[dict, Path], small_checkpoint: str, cifar_shards: Shards
) -> None:
    results, _ = evaluation
    nasty = {**results, "classes": ["<script>alert(1)</script>"] * 10}
    subject = load_subject(small_checkpoint)
    baseline = random_init(subject.encoder, 0)
    features = {"encoder": encoder_features(subject.encoder, subject.preprocessing)}
    train, test = (
        probe_set(uri, features, subject.preprocessing, batch_size=64) for uri in cifar_shards
    )
    html = write_report(nasty, subject, train, test, baseline)
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_an_artifact_is_evaluated_without_its_run(
    cifar_shards: Shards, encoder: VisionTransformer, tmp_path: Path
) -> None:
    save_artifact(tmp_path / "artifact", encoder, PREP, {"run": "elsewhere", "step": 3})
    cfg = EvaluateConfig(
        checkpoint=str(tmp_path / "artifact"),
        data=cifar_shards[0],
        test=cifar_shards[1],
        out=str(tmp_path / "out"),
        probe_epochs=1,
        limit=60,
    )
    results = evaluate(cfg)
    assert results["provenance"]["run"] == "elsewhere"
    assert results["data"]["data"]["images"] == 60
    assert "<svg" not in (tmp_path / "out" / "report.html").read_text()


def test_near_duplicates_are_left_out_and_told(
    cifar_shards: Shards, small_checkpoint: str, tmp_path: Path
) -> None:
    """The threshold is so high that a tenth of real pictures count; they are found by hand."""
    grey = []
    for uri in cifar_shards:
        (pixels_NCHW,) = compute_features(
            {"x": lambda batch: batch.pixels}, decode_batches(load_labelled(uri), PREP, 64)
        ).values()
        grey.append(np.tensordot(pixels_NCHW, [0.299, 0.587, 0.114], axes=(1, 0)))
    train, test = grey
    # 18 rows of cells of a 32 x 32 picture are 3 pixels high at most; columns are single pixels.
    rows = [(i * 32 // 18, -(-(i + 1) * 32 // 18)) for i in range(18)]
    cells = [np.stack([g[:, a:b].mean(1) for a, b in rows], axis=1) for g in (train, test)]
    apart = np.array([np.abs(cells[0] - one).max(axis=(1, 2)).min() for one in cells[1]])
    levels = float(np.quantile(apart, 0.1, method="midpoint"))
    removed = int((apart <= levels).sum())
    assert 0 < removed < len(test) / 2
    cfg = EvaluateConfig(
        checkpoint=small_checkpoint,
        data=cifar_shards[0],
        test=cifar_shards[1],
        out=str(tmp_path),
        probe_epochs=1,
        near_duplicates=levels,
    )
    shown = io.StringIO()
    results = evaluate(cfg, console=Console(file=shown, width=300))
    assert results["data"]["test"]["near_duplicates"]["removed"] == removed
    assert results["data"]["test"]["images"] == len(test) - removed
    note = f"--test: {removed} of {len(test)} samples"
    assert note in shown.getvalue()
    assert note in (tmp_path / "report.html").read_text()
    assert not [text for text in results["warnings"] if "no label" in text]
    with pytest.raises(ValueError, match="--near-duplicates 0: every sample"):
        evaluate(dataclasses.replace(cfg, test=cifar_shards[0], near_duplicates=0))


def test_what_cannot_be_evaluated_says_why(
    cifar_shards: Shards, small_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--checkpoint: no artifact, and"):
        load_subject(str(tmp_path))
    cfg = EvaluateConfig(checkpoint=small_checkpoint, data=cifar_shards[0], test=str(tmp_path))
    with pytest.raises(ValueError, match="not ingested"):
        evaluate(cfg)
    manifests = [read_manifest(uri) for uri in cifar_shards]
    object.__setattr__(manifests[1], "classes", ("cat", *manifests[1].classes[1:]))
    monkeypatch.setattr(input_sets, "read_manifest", lambda uri: manifests[uri == cifar_shards[1]])
    cfg = EvaluateConfig(checkpoint=small_checkpoint, data=cifar_shards[0], test=cifar_shards[1])
    with pytest.raises(ValueError, match="different classes: airplane"):
        evaluate(cfg)
    object.__setattr__(manifests[0], "classes", ())
    with pytest.raises(ValueError, match="--data: these shards have no labels"):
        evaluate(cfg)
