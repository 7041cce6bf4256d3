"""Game states as classes, the supervised baseline, and a second test set for the same probes.

N clips, D features.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.pipelines.clips import segment, write_rows
from models.encoders.input_batch import InputBatch
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from pipelines.config.data import ClipConfig
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.rows import Wanted, iter_labelled
from pipelines.evaluate import evaluate
from pipelines.evaluation.probes.attentive import attentive_probe
from pipelines.evaluation.probes.attentive_sweep import AttentiveProbes
from pipelines.evaluation.probes.knn import knn_accuracy
from pipelines.evaluation.probes.linear import linear_probe
from pipelines.evaluation.state_labels import Bins, find_column, state_reader
from pipelines.evaluation.supervised import Supervised, supervised_baseline
from pipelines.loading.clips import ClipSampler

SAMPLER = ClipSampler(frames=4, settings=ClipConfig(stride=2))
PREP = Preprocessing(image_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def config(**flags: object) -> EvaluateConfig:
    return EvaluateConfig(checkpoint="c", data="d", test="t", **flags)  # type: ignore[arg-type]


# --- bins


def test_bins_hold_equal_shares_of_the_training_set_and_others_take_their_edges() -> None:
    values_N = np.random.default_rng(0).permutation(100).astype(float)
    bins = Bins.of(values_N, 4)
    assert np.bincount(bins.classes(values_N)).tolist() == [25, 25, 25, 25]
    low, mid, high = bins.edges
    asked = np.array([-5, low - 0.5, low, mid, high - 0.5, high, 1e9])
    assert bins.classes(asked).tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert bins.names == [
        f"below {low:g}",
        f"{low:g} to {mid:g}",
        f"{mid:g} to {high:g}",
        f"{high:g} and more",
    ]


def test_equal_values_share_a_bin_and_too_few_of_them_are_refused() -> None:
    values_N = np.array([0.0] * 30 + [1.0] * 50 + [2.0] * 20)
    assert Bins.of(values_N, 2).classes(np.array([0.0, 1.0, 2.0])).tolist() == [0, 1, 1]
    for count in (3, 4):
        with pytest.raises(ValueError, match="--bins"):
            Bins.of(values_N, count)
    with pytest.raises(ValueError, match="--bins"):
        Bins.of(np.zeros(10), 2)


# --- which column


def test_names_are_looked_up_by_game(tmp_path: Path) -> None:
    games = {"pong": {"states": ["score", "lives", "ram_0"]}, "doom": {"states": ["HEALTH"]}}
    (tmp_path / "columns.json").write_text(json.dumps(games))
    flags = {"columns": str(tmp_path / "columns.json"), "only": "pong"}
    assert find_column(config(), "7") == 7
    named = config(state="ram_0", **flags)
    assert find_column(named, "ram_0") == 2
    game = config(state="ram_0", columns=flags["columns"], only="chess")
    no_game = config(state="ram_0", columns=flags["columns"])
    for cfg, name, message in (
        (config(state="ram_0"), "ram_0", "--columns"),
        (no_game, "ram_0", "--only"),
        (game, "ram_0", "no 'chess'"),
        (named, "HEALTH", "--state: pong has no 'HEALTH'; it has score"),
    ):
        with pytest.raises(ValueError, match=message):
            find_column(cfg, name)
    with pytest.raises(ValueError, match="--number: pong has no 'HEALTH'"):
        find_column(named, "HEALTH", "--number")
    for flags, message in (
        ({"columns": "c"}, "--columns"),
        ({"bins": 1}, "--bins"),
        ({"number": ("1", "1")}, "--number: names a column twice"),
        ({"number": ("1",), "supervised_epochs": 1}, "--supervised-epochs: .* add --state"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**flags)


# --- rows and frames


def with_states(number: int, columns: int = 2) -> dict:
    """Column 1 counts frames up from 100 times the video's number."""
    row = segment(number)
    counts = 100 * number + np.arange(row["num_frames"])
    row["states"] = [[-1.0] * (columns - 1) + [float(count)] for count in counts]
    return row


def test_only_rows_with_states_of_one_class_are_read_at_the_middle_frame(tmp_path: Path) -> None:
    rows = [with_states(n) if n % 2 else segment(n) for n in range(18)]
    uri = write_rows(tmp_path / "mixed", rows)
    wanted = Wanted(column="states", only=1)
    read = state_reader(1, SAMPLER)
    tables = list(iter_labelled(uri, wanted=wanted))
    found = np.concatenate([read(table) for table in tables])
    numbers = [n for n in range(18) if n % 2 and n % 3 == 1]
    expected = []
    for n in numbers:
        frames_NF = SAMPLER.middle([rows[n]["num_frames"]], [rows[n]["fps"]])
        expected.append(100 * n + frames_NF[0, 2])
    assert found.tolist() == expected
    few = list(iter_labelled(uri, 2, wanted=wanted))
    assert sum(table.num_rows for table in few) == 2
    with pytest.raises(ValueError, match=r"--state: column 5, but a frame has only 2.*--only"):
        state_reader(5, SAMPLER)(tables[0])


# --- a second test set


def test_a_shifted_set_is_scored_by_the_same_probes() -> None:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 3, 120)
    features_ND = (np.eye(3)[labels_N] * 3 + rng.normal(size=(120, 3))).astype(np.float32)
    shifted_ND = features_ND[:, [1, 2, 0]].copy()  # every class looks like another
    train = (features_ND[:60], labels_N[:60])
    test, shifted = (features_ND[60:], labels_N[60:]), (shifted_ND[60:], labels_N[60:])
    for probe, settings in (
        (linear_probe, {"epochs": 5}),
        (attentive_probe, {"epochs": 60, "heads": 1}),
    ):
        lift = (lambda x: x[:, None]) if "heads" in settings else (lambda x: x)
        alone = probe(lift(train[0]), train[1], lift(test[0]), test[1], **settings)
        assert alone.shift_accuracy is None
        both = probe(
            *(lift(train[0]), train[1], lift(test[0]), test[1]),
            shifted=(lift(shifted[0]), shifted[1]),
            **settings,
        )
        assert both.accuracy == alone.accuracy > 0.7
        assert both.shift_accuracy < 0.3
        # Scored alone as the test set, the shifted set gives the same number.
        swapped = probe(lift(train[0]), train[1], lift(shifted[0]), shifted[1], **settings)
        assert swapped.accuracy == both.shift_accuracy
    assert knn_accuracy(*train, *shifted) < 0.3


def test_standardised_tokens_show_a_probe_what_a_common_part_hides() -> None:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 2, 200)
    tokens = rng.normal(size=(200, 6, 8)).astype(np.float32)
    tokens[:, :, 3] += 2 * labels_N[:, None]
    scale, shared = np.array([1, 5, 0.1, 0.02, 2, 1, 3, 0.5]), 50 * rng.normal(size=8)
    loud = (tokens * scale + shared).astype(np.float32)
    parts = (loud[:140], labels_N[:140], loud[140:], labels_N[140:])
    settings = {"heads": 2, "epochs": 40, "lrs": (5e-3,), "weight_decays": (0.1,)}
    assert attentive_probe(*parts, standardise=True, **settings).accuracy > 0.85
    assert attentive_probe(*parts, **settings).accuracy < 0.7
    probes = AttentiveProbes(1, 8, 2, 2)
    probes.standardise(loud)
    found = (torch.from_numpy(loud) - probes.mean_D) * probes.scale_D
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(8), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.std((0, 1)), torch.ones(8), atol=2e-3, rtol=0)


# --- the supervised baseline


def moving_bars(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips of a bright bar at one of three places, and the place: uint8 [N, 3, 4, 16, 16], [N]."""
    rng = np.random.default_rng(1)
    places_N = rng.integers(0, 3, count)
    clips = rng.integers(0, 120, (count, 3, 4, 16, 16)).astype(np.uint8)
    for clip, place in zip(clips, places_N, strict=True):
        clip[..., 5 * place : 5 * place + 4] += 100
    return clips, places_N


def train_on(labels_N: np.ndarray, clips: np.ndarray, truth_N: np.ndarray) -> Supervised:
    torch.manual_seed(0)
    encoder = VisionTransformer(
        EncoderShape(
            image_size=16,
            patch_size=8,
            width=32,
            depth=1,
            heads=2,
            frames=4,
            tubelet=2,
            patch_std=0.14,
        )
    )
    samples = InputBatch(torch.from_numpy(clips))
    train, test = (samples[:192], labels_N[:192]), (samples[192:], truth_N[192:])
    return supervised_baseline(encoder, PREP, train, test, test, epochs=8, batch_size=16)


def test_the_supervised_baseline_learns_what_can_be_learned_and_nothing_from_shuffled() -> None:
    clips, places_N = moving_bars(256)
    learned = train_on(places_N, clips, places_N)
    assert learned.accuracy > 0.9
    assert learned.shift_accuracy == learned.accuracy
    shuffled = train_on(np.random.default_rng(2).permutation(places_N), clips, places_N)
    assert shuffled.accuracy < 0.6


# --- the job


def test_evaluate_probes_states_beside_a_supervised_baseline(
    checkpoint: str,
    tmp_path: Path,
) -> None:
    train = write_rows(tmp_path / "train", [with_states(n) for n in range(60)])
    test = write_rows(tmp_path / "test", [with_states(n) for n in range(60, 84)])
    cfg = EvaluateConfig(
        checkpoint=checkpoint,
        data=train,
        test=test,
        shift_test=test,
        out=str(tmp_path / "out"),
        state="1",
        bins=2,
        only="b",
        probe_epochs=2,
        attentive_epochs=1,
        supervised_epochs=1,
        knn_k=3,
    )
    results = evaluate(cfg)
    assert results["data"]["test"]["videos"] == results["data"]["shift_test"]["videos"] == 8
    assert len(results["classes"]) == 2
    for row in results["rows"].values():
        assert row["knn_shift"] == row["knn"]
        for probe in ("linear", "attentive"):
            assert row[probe]["shift_accuracy"] == row[probe]["accuracy"]
    assert results["supervised"]["shift_accuracy"] == results["supervised"]["accuracy"]
    html = (tmp_path / "out" / "report.html").read_text()
    for text in ("Supervised", "Shifted", results["classes"][0], 'table class="confusion"'):
        assert text in html
    with pytest.raises(ValueError, match="--only: no class 'x'; there are a, b, c"):
        evaluate(dataclasses.replace(cfg, only="x"))


def test_evaluate_reads_numbers_alone_and_leaves_out_what_has_none(
    checkpoint: str, tmp_path: Path
) -> None:
    rows = [with_states(n) for n in range(44)]
    for row in rows[::4]:
        row["states"] = [[math.nan, second] for _, second in row["states"]]
    for row in rows[1::4]:
        row["states"] = [[4.0, second] for _, second in row["states"]]
    train, test = (
        write_rows(tmp_path / name, part) for name, part in (("a", rows[:32]), ("b", rows[32:]))
    )
    cfg = EvaluateConfig(
        checkpoint=checkpoint,
        data=train,
        test=test,
        shift_test=train,
        out=str(tmp_path / "out"),
        number=("0", "1"),
        attentive_epochs=1,
        attentive_lrs=(1e-3,),
        attentive_decays=(0.1,),
    )
    results = evaluate(cfg)
    assert results["data"]["test"]["numbers"] == {
        "0": {"used": 9, "left_out": 3},
        "1": {"used": 12, "left_out": 0},
    }
    missing = "8 samples have no finite value of --number 0 and are left out"
    assert f"--data: {missing}" in results["warnings"]
    assert results["classes"][-1] == "no value"
    for row in results["rows"].values():
        assert "knn" not in row
        for probe in ("ridge", "attentive"):
            for number in ("0", "1"):
                assert {"r2", "mae", "spearman", "shift_r2"} <= row["numbers"][number][probe].keys()
    html = (tmp_path / "out" / "report.html").read_text()
    maps = html.partition("<h2>Where the answers are read</h2>")[2].partition("</section>")[0]
    assert maps.count("<img ") == 4 * 6 * 2  # two probes of two numbers, six clips
    for text in ("<h2>Numbers</h2>", "Ridge R2", "Attentive MAE", "Shifted R2", missing):
        assert text in html
    # Another evaluation of the same numbers stands beside.
    again = dataclasses.replace(cfg, out=str(tmp_path / "again"), compare=(str(tmp_path / "out"),))
    evaluate(again)
    comparison = (tmp_path / "again" / "report.html").read_text().split("<h2>Comparison</h2>")[1]
    assert "Ridge R2" in comparison.partition("</section>")[0]
    with pytest.raises(ValueError, match="--number: column 7"):
        evaluate(dataclasses.replace(cfg, number=("7",)))
