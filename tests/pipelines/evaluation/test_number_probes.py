"""Probes of numbers against closed forms, SciPy, and sets whose answer is known.

N rows, Q queries, T tokens, D features.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from pipelines.config.jobs import EvaluateConfig
from pipelines.evaluation.arrays import class_table
from pipelines.evaluation.probe_sets import ProbeSet, number_set
from pipelines.evaluation.probes.attentive import AttentiveNumber
from pipelines.evaluation.probes.attentive_sweep import Sweep
from pipelines.evaluation.probes.linear import PROBE_LRS, PROBE_WEIGHT_DECAYS, fit_linear
from pipelines.evaluation.probes.number_probe import number_score
from pipelines.evaluation.probes.probe import ProbeTask
from pipelines.evaluation.probes.registry import run_probes
from pipelines.evaluation.probes.ridge import RidgeProbe
from pipelines.evaluation.report.confusion import confusions
from pipelines.evaluation.ridge import fit_ridge

SWEEP = Sweep(heads=2, epochs=20, lrs=(1e-2, 1e-5), weight_decays=(0.01,), batch_size=32)


def linear_set(rows: int, width: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and a linear function of them, with noise."""
    rng = np.random.default_rng(seed)
    weight_D = np.random.default_rng(99).normal(size=width)
    features_ND = rng.normal(size=(rows, width)) * np.logspace(-1, 1, width) + 3
    values_N = features_ND @ (weight_D / np.logspace(-1, 1, width))
    return features_ND.astype(np.float32), 100 + values_N + noise * rng.normal(size=rows)


# --- scores


def test_scores_are_what_their_names_say() -> None:
    rng = np.random.default_rng(0)
    truth_Q = rng.normal(size=200) ** 3
    predicted_Q = truth_Q.round(1) + 0.5 * rng.normal(size=200).round(0)  # with ties
    found = number_score(predicted_Q, truth_Q)
    ranks = [stats.rankdata(values) for values in (predicted_Q, truth_Q)]
    assert found.spearman == pytest.approx(float(np.corrcoef(*ranks)[0, 1]))
    assert found.spearman == pytest.approx(stats.spearmanr(truth_Q, predicted_Q).statistic)
    residual = np.mean((truth_Q - predicted_Q) ** 2)
    assert found.r2 == pytest.approx(1 - residual / truth_Q.var())
    assert found.mae == pytest.approx(sum(abs(truth_Q - predicted_Q)) / 200)
    monotone = number_score(np.exp(truth_Q), truth_Q)
    assert monotone.spearman == pytest.approx(1)
    assert monotone.r2 < 0.5


def test_a_constant_prediction_has_an_r2_of_zero_and_a_constant_truth_has_none() -> None:
    truth_Q = np.array([1.0, 2.0, 6.0])
    constant = number_score(np.full(3, 3.0), truth_Q)
    assert (constant.r2, constant.spearman) == (0.0, None)
    assert number_score(np.full(3, 4.0), truth_Q).r2 < 0
    nothing = number_score(truth_Q, np.ones(3))
    assert (nothing.r2, nothing.spearman, nothing.mae) == (None, None, 2.0)
    with pytest.raises(ValueError, match="predictions"):
        number_score(truth_Q[:2], truth_Q)


# --- ridge


@pytest.mark.parametrize(("rows", "width"), [(60, 8), (12, 30)])
def test_ridge_solves_the_normal_equations_with_the_penalty_it_names(rows: int, width: int) -> None:
    features_ND, values_N = linear_set(rows, width, 2.0, 1)
    x_ND = features_ND.astype(np.float64) - features_ND.mean(0, dtype=np.float64)
    found = fit_ridge(torch.from_numpy(x_ND), torch.from_numpy(values_N)[:, None])
    gram_DD = x_ND.T @ x_ND + found.penalty * np.eye(width)
    weight_D = linalg.solve(gram_DD, x_ND.T @ (values_N - values_N.mean()), assume_a="pos")
    np.testing.assert_allclose(found.weight_DC[:, 0].numpy(), weight_D, rtol=1e-5, atol=1e-7)
    # The penalty is the best of leaving out each row in turn, by refitting.
    largest = np.linalg.norm(x_ND, 2) ** 2
    errors = {}
    for penalty in largest * np.logspace(-5, 1, 13):
        errors[penalty] = np.mean([_left_out(x_ND, values_N, i, penalty) for i in range(rows)])
    best = min(errors, key=lambda penalty: errors[penalty])
    assert found.penalty == pytest.approx(best)
    assert found.left_out_error == pytest.approx(errors[best])


def _left_out(x_ND: np.ndarray, y_N: np.ndarray, i: int, penalty: float) -> float:
    """Squared error of row `i` by a ridge regression with intercept on the other rows."""
    x, y = np.delete(x_ND, i, 0), np.delete(y_N, i)
    centred = x - x.mean(0)
    gram = centred.T @ centred + penalty * np.eye(x.shape[1])
    weight = linalg.solve(gram, centred.T @ (y - y.mean()))
    return float((y.mean() + (x_ND[i] - x.mean(0)) @ weight - y_N[i]) ** 2)


def test_a_ridge_probe_reads_what_is_linear_and_nothing_from_shuffled_numbers() -> None:
    train, values_N = linear_set(300, 10, 0.3, 2)
    test, truth_Q = linear_set(200, 10, 0.3, 3)
    found = RidgeProbe.fit(train, values_N)
    score = number_score(found.predict(test), truth_Q)
    assert score.r2 > 0.95
    assert found.left_out_r2 == pytest.approx(score.r2, abs=0.03)
    shuffled = RidgeProbe.fit(train, np.random.default_rng(4).permutation(values_N))
    assert number_score(shuffled.predict(test), truth_Q).r2 < 0.05
    assert shuffled.left_out_r2 < 0.05


def test_features_that_never_vary_read_the_mean() -> None:
    found = RidgeProbe.fit(np.ones((20, 4), np.float32), np.arange(20.0))
    np.testing.assert_allclose(found.predict(np.ones((3, 4), np.float32)), 9.5)


# --- attentive


def tokens_of(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of noise; one holds a number, which its opposite in another hides in the mean."""
    rng = np.random.default_rng(seed)
    values_N = rng.uniform(200, 300, count)
    tokens = 0.3 * rng.standard_normal((count, 8, 12)).astype(np.float32)
    at, rows = rng.integers(0, 8, count), np.arange(count)
    tokens[rows, at, 0] += (values_N - 250) / 20
    tokens[rows, at, -1] += 3  # how the query finds it
    tokens[rows, (at + 1) % 8] -= tokens[rows, at]
    return tokens, values_N


def test_the_attentive_probe_reads_a_number_from_the_token_that_holds_it() -> None:
    train, values_N = tokens_of(320, 0)
    test, truth_Q = tokens_of(200, 1)
    probe = AttentiveNumber.fit(SWEEP, train, values_N)
    score = number_score(probe.predict(test), truth_Q)
    assert score.r2 > 0.8
    assert score.mae < 10  # of 200 to 300; the mean's is 25
    assert probe.lr == 1e-2  # picked on the held-out part
    of_the_mean = RidgeProbe.fit(train.mean(1), values_N).predict(test.mean(1))
    assert number_score(of_the_mean, truth_Q).r2 < 0.1
    shuffled = np.random.default_rng(2).permutation(values_N)
    control = AttentiveNumber.fit(dataclasses.replace(SWEEP, epochs=5), train, shuffled)
    assert number_score(control.predict(test), truth_Q).r2 < 0.1


# --- one row of an evaluation


def _set(seed: int, rows: int = 80) -> ProbeSet:
    """Features that hold `x` and not `noise`; every tenth `x` is missing."""
    rng = np.random.default_rng(seed)
    features_ND, values_N = linear_set(rows, 6, 0.2, seed)
    values_N[::10] = [np.nan, np.inf][seed % 2]
    return ProbeSet(
        uri="x",
        features={"encoder": features_ND},
        labels_N=rng.integers(0, 2, rows),
        places_N3=np.zeros((rows, 3), np.int64),
        ids_N16=np.zeros((rows, 16), np.uint8),
        tokens={"encoder": np.stack([features_ND] * 2, 1).astype(np.float16)},
        numbers={"x": values_N, "noise": rng.normal(size=rows)},
    )


def test_values_that_are_not_finite_are_left_out_and_all_that_belongs_to_their_rows() -> None:
    part = _set(0)
    found = number_set(part, "x")
    assert (len(found.labels_N), found.left_out) == (72, 8)
    kept = np.arange(80) % 10 > 0
    assert np.array_equal(found.features["encoder"], part.features["encoder"][kept])
    assert np.array_equal(found.tokens["encoder"], part.tokens["encoder"][kept])
    assert np.array_equal(found.labels_N, part.numbers["x"][kept])
    assert number_set(part, "noise").left_out == 0


def test_every_number_of_a_row_is_read_beside_its_classes_or_alone() -> None:
    cfg = EvaluateConfig(
        checkpoint="c", data="d", test="t", number=("x", "noise"), attentive_epochs=3
    )
    sets = {"train": _set(0, 200), "test": _set(1), "shifted": _set(2)}
    row = run_probes(ProbeTask(row="encoder", cfg=cfg, heads=1, **sets))
    assert not {"knn", "linear", "attentive", "few_shot_10"} & row.keys()
    assert row["rankme"] > 1
    x, noise = row["numbers"]["x"], row["numbers"]["noise"]
    assert x["ridge"]["r2"] > 0.95
    assert x["ridge"]["shift_r2"] > 0.95
    assert noise["ridge"]["r2"] < 0.1
    for name in ("r2", "mae", "spearman", "shift_r2", "shift_mae", "shift_spearman"):
        assert {*map(type, (x["ridge"][name], x["attentive"][name]))} == {float}
    # Scored as the test set, the shifted set gives the same numbers.
    swapped = run_probes(
        ProbeTask(row="encoder", cfg=cfg, heads=1, train=sets["train"], test=sets["shifted"])
    )["numbers"]["x"]
    for probe in ("ridge", "attentive"):
        assert swapped[probe]["r2"] == x[probe]["shift_r2"]
        assert swapped[probe]["shift_mae"] is None
    both = dataclasses.replace(cfg, state="3", probe_epochs=1, attentive_epochs=1)
    row = run_probes(ProbeTask(row="encoder", cfg=both, heads=1, **sets))
    assert {"knn", "linear", "attentive", "numbers"} <= row.keys()


# --- maps over the patches


def test_a_map_sums_to_the_answer_of_its_probe() -> None:
    sets = {"train": _set(0, 200), "test": _set(1)}
    settings = {"state": "3", "number": ("x",), "probe_epochs": 2, "attentive_epochs": 1}
    cfg = EvaluateConfig(checkpoint="c", data="d", test="t", **settings)
    task = ProbeTask(row="encoder", cfg=cfg, heads=1, **sets)
    run_probes(task)
    assert [*task.readouts] == [
        (None, "attentive"),
        (None, "linear"),
        ("x", "attentive"),
        ("x", "ridge"),
        ("noise", "attentive"),
        ("noise", "ridge"),
    ]
    tokens_NTD = torch.randn(5, 7, 6) + 3
    mean_ND = tokens_NTD.mean(1).numpy()
    ridge = task.readouts["x", "ridge"]
    part = number_set(sets["train"], "x")
    expected_N = RidgeProbe.fit(part.features["encoder"], part.labels_N).predict(mean_ND)
    torch.testing.assert_close(ridge.answers(tokens_NTD), expected_N, atol=1e-4, rtol=1e-4)
    total_N = ridge.maps(tokens_NTD).sum(1) + ridge.offset_C
    torch.testing.assert_close(total_N, expected_N, atol=1e-4, rtol=1e-4)
    linear = task.readouts[None, "linear"]
    fitted = fit_linear(
        sets["train"].features["encoder"],
        sets["train"].labels_N,
        [(lr, decay) for lr in PROBE_LRS for decay in PROBE_WEIGHT_DECAYS],
        2,
    )
    logits_NC = fitted.scaling(torch.from_numpy(mean_ND)) @ fitted.weight_DC + fitted.bias_C
    winner_N = logits_NC.argmax(1)
    assert torch.equal(linear.answers(tokens_NTD), winner_N)
    total_N = linear.maps(tokens_NTD).sum(1) + linear.offset_C[winner_N]
    torch.testing.assert_close(total_N, logits_NC.amax(1), atol=1e-4, rtol=1e-4)
    # A token that is not there adds nothing, and the others count for more.
    longer_NTD = torch.cat([tokens_NTD, torch.full((5, 2, 6), torch.nan)], 1)
    longer_NT = ridge.maps(longer_NTD)
    torch.testing.assert_close(longer_NT[:, :7], ridge.maps(tokens_NTD))
    assert (longer_NT[:, 7:] == 0).all()
    attention = task.readouts["x", "attentive"]
    torch.testing.assert_close(attention.maps(tokens_NTD).sum(1), torch.ones(5))


# --- confusion


def test_a_class_table_counts_every_pair_and_the_report_tells_the_change() -> None:
    predicted_Q, truth_Q = torch.tensor([0, 1, 1, 1, 3]), np.array([0, 0, 1, 1, 1])
    table = class_table(predicted_Q, truth_Q, 4)
    assert table.accuracy == [0.5, 2 / 3, None, None]
    assert table.confusion == [[1, 1, 0, 0], [0, 2, 0, 1], [0] * 4, [0] * 4]
    shifted = class_table(torch.tensor([0, 0, 0]), np.array([0, 0, 1]), 4)
    row = {
        "knn": 0.6,
        "knn_classes": dataclasses.asdict(table),
        "knn_shift_classes": dataclasses.asdict(shifted),
    }
    first, second = confusions({"rows": {"encoder": row}, "classes": ["a", "b", "c", "d"]})
    assert [r["accuracy"] for r in first["rows"]] == [50, pytest.approx(200 / 3), None, None]
    assert [r["change"] for r in second["rows"]] == [50, pytest.approx(-200 / 3), None, None]
    assert first["rows"][0]["cells"] == [(1, 50), (1, 50), (0, 0), (0, 0)]
    many = class_table(predicted_Q, truth_Q, 101)
    assert (many.confusion, len(many.accuracy)) == (None, 101)
