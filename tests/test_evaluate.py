"""Features, the evaluation job and its report, on real images.

N images, D features.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fake_training import change, memory_batches, tiny_config
from rich.console import Console

from models.preprocessing import Preprocessing, normalize
from models.vit import VisionTransformer
from models.weights import save_artifact
from pipelines import evaluate as job
from pipelines import reading, report
from pipelines.comparison import comparison_table, read_compared
from pipelines.config import (
    DataConfig,
    EvaluateConfig,
    MaskConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
)
from pipelines.curves import SECTIONS, training_curves
from pipelines.evaluate import evaluate, load_subject, random_init
from pipelines.features import (
    compute_features,
    decode_all,
    decode_batches,
    encoder_features,
    extract_features,
    pixel_features,
)
from pipelines.figures import line_chart, pca_pictures
from pipelines.loading import make_reader
from pipelines.online_probe import build_probe
from pipelines.probe_rows import PLACE, iter_labelled, load_labelled, read_places, table_labels
from pipelines.probes import knn_accuracy
from pipelines.shards import (
    open_shards,
    read_manifest,
    read_row_group,
    read_rows,
    write_manifest,
    write_shard,
)
from pipelines.train_state import new_state

PREP = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
Shards = tuple[str, str]


@pytest.fixture
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(image_size=32, patch_size=8, width=48, depth=2, heads=3)


def test_limited_rows_are_a_fixed_random_subset_in_order(cifar_shards: Shards) -> None:
    everything, some = load_labelled(cifar_shards[0]), load_labelled(cifar_shards[0], 100)
    assert some.num_rows == 100
    assert some.equals(load_labelled(cifar_shards[0], 100))
    order = {v: i for i, v in enumerate(everything["sample_id"].to_pylist())}
    positions = [order[v] for v in some["sample_id"].to_pylist()]
    assert positions == sorted(positions)
    assert max(positions) > everything.num_rows // 2  # not the first hundred
    assert len(set(table_labels(some))) == 10


def _with_few_labels(uri: str, folder: Path) -> str:
    """The data set with every tenth row labelled, in a single shard."""
    fs, root = open_shards(folder)
    rows = read_rows(uri)
    labels = [v if i % 10 == 3 else None for i, v in enumerate(rows["label"].to_pylist())]
    table = rows.set_column(4, "label", pa.array(labels, pa.int32()))
    shard = write_shard(fs, root, table, 16)
    write_manifest(folder, dataclasses.replace(read_manifest(uri), shards=(shard,)))
    return str(folder)


def test_limit_counts_labelled_rows_and_reads_few_row_groups(
    cifar_shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = _with_few_labels(cifar_shards[0], tmp_path)  # 51 of 512 rows
    everything, some = load_labelled(uri), load_labelled(uri, 20)
    assert everything.num_rows == 51
    assert some.num_rows == 20
    assert min(table_labels(some)) >= 0
    assert set(some["sample_id"].to_pylist()) < set(everything["sample_id"].to_pylist())
    assert load_labelled(uri, 60).equals(everything)

    whole = []

    def counted(fs, root, file, group, columns):  # type: ignore[no-untyped-def]
        whole.append(group) if "image" in columns else None
        return read_row_group(fs, root, file, group, columns)

    monkeypatch.setattr("pipelines.probe_rows.read_row_group", counted)
    load_labelled(cifar_shards[0], 100)  # 32 row groups of 16
    assert len(whole) == 7


def test_classes_that_differ_leave_no_online_probe(cifar_shards: Shards, tmp_path: Path) -> None:
    train, test = cifar_shards
    for path in Path(test).glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = read_manifest(test)
    said: list[str] = []
    for classes in (manifest.classes, manifest.classes[::-1], manifest.classes[1:]):
        write_manifest(tmp_path, dataclasses.replace(manifest, classes=classes))
        cfg = PretrainConfig(
            data=DataConfig(train=train, test=str(tmp_path)),
            model=ModelConfig(image_size=32, patch_size=8),
            run=RunConfig(probe_every=5),
        )
        assert bool(build_probe(cfg, said.append)) == (classes == manifest.classes)
    shared = "no online kNN: --data.train and --data.test have different classes: "
    assert said == [shared + "their order", shared + "airplane"]


def test_rows_are_found_again_by_their_place(cifar_shards: Shards) -> None:
    table = load_labelled(cifar_shards[0], 50)
    places_N3 = np.stack([table[name].to_numpy() for name in PLACE], axis=1)
    again = read_places(cifar_shards[0], places_N3[[7, 3, 40]])
    assert again["sample_id"].to_pylist() == table["sample_id"].take([7, 3, 40]).to_pylist()


def test_features_do_not_depend_on_batching(
    cifar_shards: Shards, encoder: VisionTransformer
) -> None:
    table = load_labelled(cifar_shards[1], 70)
    whole = extract_features(encoder, PREP, table, batch_size=70)
    parts = extract_features(encoder, PREP, iter_labelled(cifar_shards[1], 70), batch_size=16)
    assert whole.shape == (70, 48)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    decoded = extract_features(encoder, PREP, decode_all(table, PREP), batch_size=70)
    np.testing.assert_array_equal(decoded, whole)
    patches = extract_features(encoder, PREP, table, batch_size=70, pooling="patches")
    assert patches.shape == (70, 16, 48)
    np.testing.assert_allclose(patches.mean(axis=1), whole, atol=1e-5)


def test_features_are_the_encoders_own(cifar_shards: Shards, encoder: VisionTransformer) -> None:
    table = load_labelled(cifar_shards[1], 5)
    images = decode_all(table, PREP)
    expected = encoder(normalize(images, PREP.mean, PREP.std)).mean(dim=1).detach().numpy()
    encoder.train()
    np.testing.assert_allclose(extract_features(encoder, PREP, table), expected, atol=1e-6)
    assert encoder.training  # left as it was


def test_bfloat16_features_are_close_and_fp32(
    cifar_shards: Shards, encoder: VisionTransformer
) -> None:
    table = load_labelled(cifar_shards[1], 8)
    exact = extract_features(encoder, PREP, table)
    rough = extract_features(encoder, PREP, table, autocast=True)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1


def test_raw_pixels_are_the_normalised_image_shrunk_to_32(cifar_shards: Shards) -> None:
    table = load_labelled(cifar_shards[1], 4)
    images = decode_all(table, PREP)
    pixels = pixel_features(PREP)(images)
    assert torch.equal(pixels, normalize(images, PREP.mean, PREP.std).flatten(1))
    large = Preprocessing(image_size=96, mean=PREP.mean, std=PREP.std)
    assert pixel_features(large)(decode_all(table, large)).shape == (4, 3072)


def test_a_damaged_image_stops_the_job_by_its_reason() -> None:
    rows = pa.table({"image": [b"not an image"]})
    with pytest.raises(ValueError, match="not_an_image"):
        list(decode_batches(rows, PREP, 4))


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        compute_features({"pixels": pixel_features(PREP)}, [])


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
        sets.append(job.probe_set(uri, features, PREP, batch_size=64))
    cfg = EvaluateConfig(checkpoint="", data="", test="", probe_epochs=2)
    row = job.probe(sets[0], sets[1], "encoder", cfg)
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


def test_curves_are_grouped_and_only_those_that_were_logged(tmp_path: Path) -> None:
    rows = [
        {"step": s, "loss": 1 / s, "invariance": s, "sigreg": 2.0 * s, "tuned_lr": 1e-3 * s}
        for s in (1, 2, 3)
    ]
    rows[2]["variance"] = 1.0  # one reading makes no curve
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = training_curves(str(tmp_path))
    titles = {section: [curve["title"] for curve in curves] for section, curves in drawn.items()}
    assert titles == {
        "Training": ["Loss"],
        "Terms of the loss": ["Invariance", "SIGReg"],
        "Optimizer": ["Learning rate, tuned"],
    }
    assert drawn["Terms of the loss"][1]["last"] == "6"
    assert training_curves(None) == training_curves(str(tmp_path / "none")) == {}


def test_every_term_that_an_objective_logs_has_a_curve() -> None:
    """Of a tiny batch of each objective; without this a new objective's terms would be forgotten."""
    known = {curve[0] for curves in SECTIONS.values() for curve in curves}
    for name in ("lejepa", "vicreg", "mae", "ijepa"):
        cfg = tiny_config(Path(), steps=4)
        cfg = change(cfg, objective={"name": name, "projector": (8, 8), "slices": 8})
        cfg = change(cfg, objective={"regularize": "target_pooled" if name == "lejepa" else None})
        objective = new_state(cfg, torch.device("cpu")).objective
        batch = next(memory_batches(cfg, rank=0, world_size=1, start_step=0, end_step=1))
        output = objective({key: batch[key] for key in objective.inputs})
        assert output.metrics.keys() <= known


def test_legacy_masks_shown_are_those_of_the_first_batch(
    cifar_shards: Shards, small_checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load_subject(small_checkpoint)
    assert subject.config
    config = dataclasses.replace(subject.config, mask=MaskConfig(truncate="legacy"))
    subject = dataclasses.replace(subject, config=config)
    rows = load_labelled(cifar_shards[1], 16)
    drawn: list[tuple[int, np.ndarray]] = []
    for name, seen in (("context_picture", 0), ("target_picture", 1)):

        def picture(image: np.ndarray, ids: np.ndarray, grid: int, seen: int = seen) -> np.ndarray:
            drawn.append((seen, ids))
            return image

        monkeypatch.setattr(report, name, picture)
    assert len(report._masks(subject, rows, decode_all(rows, PREP))) == 8

    data = dataclasses.replace(config.data, train=cifar_shards[0])
    reader = make_reader(dataclasses.replace(config, data=data), 0, 1)
    trained = reading._masks(reader, np.zeros(0, np.uint64), 0, range(1))
    for seen, name in enumerate(("context_ids", "target_ids")):
        shown = np.stack([ids for which, ids in drawn if which == seen])
        np.testing.assert_array_equal(shown, trained[name][0][:8])
    assert "first" in report._mask_note(config)


def test_class_names_cannot_inject_markup(
    evaluation: tuple[dict, Path], small_checkpoint: str, cifar_shards: Shards
) -> None:
    results, _ = evaluation
    nasty = {**results, "classes": ["<script>alert(1)</script>"] * 10}
    subject = load_subject(small_checkpoint)
    baseline = random_init(subject.encoder, 0)
    features = {"encoder": encoder_features(subject.encoder, subject.preprocessing)}
    train, test = (
        job.probe_set(uri, features, subject.preprocessing, batch_size=64) for uri in cifar_shards
    )
    html = job.write_report(nasty, subject, train, test, baseline)
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


def test_what_cannot_be_evaluated_says_why(
    cifar_shards: Shards, small_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--checkpoint: no artifact, and"):
        load_subject(str(tmp_path))
    cfg = EvaluateConfig(checkpoint=small_checkpoint, data=cifar_shards[0], test=str(tmp_path))
    with pytest.raises(ValueError, match="not ingested"):
        evaluate(cfg)
    manifests = [job.read_manifest(uri) for uri in cifar_shards]
    object.__setattr__(manifests[1], "classes", ("cat", *manifests[1].classes[1:]))
    monkeypatch.setattr(job, "read_manifest", lambda uri: manifests[uri == cifar_shards[1]])
    cfg = EvaluateConfig(checkpoint=small_checkpoint, data=cifar_shards[0], test=cifar_shards[1])
    with pytest.raises(ValueError, match="different classes: airplane"):
        evaluate(cfg)
    object.__setattr__(manifests[0], "classes", ())
    with pytest.raises(ValueError, match="--data: these shards have no labels"):
        evaluate(cfg)


def test_a_chart_spans_its_values_and_skips_what_is_not_a_number() -> None:
    chart = line_chart([(0, 1.0), (50, float("nan")), (100, 3.0)], "loss")
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.group(1).split())
    assert x0 < x1
    assert y0 > y1  # up is smaller in SVG
    assert "nan" not in chart
    assert line_chart([(1, float("inf"))], "loss") == ""
    assert "polyline" in line_chart([(5, 2.0), (6, 2.0)], "flat")
    assert "polyline" in line_chart([(5, 0.04), (6, 0.04000000000000001)], "nearly flat")


def test_pca_gives_like_patches_like_colours() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(4, size=(400, 16))  # four kinds of patch differ in three directions
    tokens = rng.normal(size=(4, 24))[kinds] * 5 + 0.01 * rng.normal(size=(400, 16, 24))
    pictures = pca_pictures(tokens, 5)
    assert pictures.shape == (5, 4, 4, 3)
    flat, kinds = pictures.reshape(80, 3).astype(int), kinds[:5].ravel()
    means = np.stack([flat[kinds == k].mean(axis=0) for k in range(4)])
    within = max(np.abs(flat[kinds == k] - means[k]).max() for k in range(4))
    between = min(np.abs(means[a] - means[b]).max() for a in range(4) for b in range(a))
    assert between > 60
    assert within < between / 2
