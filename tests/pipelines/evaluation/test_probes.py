"""Probes against brute force, closed forms and sets whose answer is known.

N rows, Q queries, D features, C classes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.evaluation.probes import knn
from pipelines.evaluation.probes.few_shot import _ridge_predict, few_shot
from pipelines.evaluation.probes.knn import knn_accuracy, knn_predict, nearest
from pipelines.evaluation.probes.linear import _Heads, linear_probe
from pipelines.evaluation.validity import task_of


def _blobs(
    rng: np.random.Generator, rows: int, spread: float, classes: int = 5, width: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes around fixed centres."""
    centres = np.random.default_rng(7).normal(size=(classes, width))
    labels = rng.integers(classes, size=rows)
    return (centres[labels] + spread * rng.normal(size=(rows, width))).astype(np.float32), labels


def _knn_by_hand(bank, labels, query, k, temperature):
    predicted = []
    for q in query.astype(np.float64):
        cosine = [float(q @ b / np.linalg.norm(q) / np.linalg.norm(b)) for b in bank.astype(float)]
        votes: dict[int, float] = {}
        for i in sorted(range(len(bank)), key=lambda i: -cosine[i])[:k]:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + np.exp(cosine[i] / temperature)
        predicted.append(max(votes, key=lambda c: votes[c]))
    return np.array(predicted)


def test_knn_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    bank, labels = _blobs(rng, 200, 2.0)
    query, truth = _blobs(rng, 60, 2.0)
    expected = _knn_by_hand(bank, labels, query, 20, 0.07)
    assert np.array_equal(knn_predict(bank, labels, query).numpy(), expected)
    assert knn_accuracy(bank, labels, query, truth) == pytest.approx(
        float((expected == truth).mean())
    )


def test_knn_near_vote_outweighs_a_majority_only_when_temperature_is_low() -> None:
    bank = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], dtype=np.float32)
    query, labels = np.array([[1, 0]], dtype=np.float32), np.array([0, 1, 1])
    assert knn_predict(bank, labels, query, k=3, temperature=0.07).tolist() == [0]
    assert knn_predict(bank, labels, query, k=3, temperature=100.0).tolist() == [1]
    assert knn_predict(bank, labels, query, k=1, temperature=100.0).tolist() == [0]


def test_knn_ignores_the_length_of_features_and_the_chunking(monkeypatch) -> None:
    rng = np.random.default_rng(1)
    bank, labels = _blobs(rng, 100, 1.5)
    query, _ = _blobs(rng, 33, 1.5)
    expected = knn_predict(bank, labels, query)
    scaled = bank * rng.uniform(0.1, 10, size=(100, 1)).astype(np.float32)
    assert torch.equal(knn_predict(scaled, labels, query), expected)
    monkeypatch.setattr(knn, "SIMILARITIES_PER_CHUNK", 100)  # one query at a time
    assert torch.equal(knn_predict(bank, labels, query), expected)


def test_nearest_of_a_bank_row_is_itself_and_k_is_capped() -> None:
    bank, _ = _blobs(np.random.default_rng(2), 10, 1.0)
    similarity, index = nearest(bank, bank, 50)
    assert index.shape == (10, 10)
    assert index[:, 0].tolist() == list(range(10))
    assert torch.allclose(similarity[:, 0], torch.ones(10))


def test_knn_of_constant_features_is_chance() -> None:
    labels = np.arange(1000) % 5
    assert knn_accuracy(np.ones((1000, 4)), labels, np.ones((500, 4)), labels[:500]) == 0.2


def test_linear_probe_separates_what_is_separable_and_not_what_is_noise() -> None:
    rng = np.random.default_rng(3)
    train, labels = _blobs(rng, 600, 0.3)
    test, truth = _blobs(rng, 200, 0.3)
    assert linear_probe(train, labels, test, truth, epochs=10).accuracy == 1.0
    noise = linear_probe(
        rng.normal(size=(600, 12)), labels, rng.normal(size=(400, 12)), _wrap(truth)
    )
    assert noise.accuracy < 0.32  # chance is 0.2


def _wrap(labels: np.ndarray) -> np.ndarray:
    return np.concatenate([labels, labels])


def test_linear_probe_does_not_care_about_scale_and_offset_of_a_feature() -> None:
    rng = np.random.default_rng(4)
    train, labels = _blobs(rng, 300, 1.5)
    test, truth = _blobs(rng, 300, 1.5)
    plain = linear_probe(train, labels, test, truth, epochs=5)
    scale = np.logspace(-3, 3, 12).astype(np.float32)
    moved = linear_probe(
        train * scale + 5 * scale, labels, test * scale + 5 * scale, truth, epochs=5
    )
    assert moved.accuracy == pytest.approx(plain.accuracy, abs=0.02)


def test_heads_of_the_sweep_equal_heads_trained_alone_by_torch_sgd() -> None:
    """The closed-form gradient of all heads at once against autograd and torch.optim.SGD."""
    rng = np.random.default_rng(5)
    x, labels = map(torch.from_numpy, _blobs(rng, 64, 1.0))
    grid = [(0.1, 0.0), (0.01, 0.1)]
    heads = _Heads(12, 5, grid, torch.device("cpu"))
    alone = [torch.nn.Linear(12, 5) for _ in grid]
    optimizers = []
    for layer, (lr, decay) in zip(alone, grid, strict=True):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
        optimizers.append(torch.optim.SGD(groups, lr=lr, momentum=0.9))
    for _ in range(5):
        heads.step(x, labels, 1.0)
        for layer, optimizer in zip(alone, optimizers, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), labels).backward()
            optimizer.step()
    expected = torch.stack([layer(x) for layer in alone], dim=1)
    torch.testing.assert_close(heads.logits(x), expected, rtol=1e-4, atol=1e-5)


def test_linear_probe_picks_its_head_without_the_test_labels() -> None:
    rng = np.random.default_rng(6)
    train, labels = _blobs(rng, 300, 2.0)
    test, truth = _blobs(rng, 300, 2.0)
    picked = linear_probe(train, labels, test, truth, epochs=5)
    blind = linear_probe(train, labels, test, np.zeros_like(truth), epochs=5)
    assert (picked.lr, picked.weight_decay) == (blind.lr, blind.weight_decay)
    assert picked.held_out_accuracy == blind.held_out_accuracy


def test_few_shot_draws_what_it_says_and_improves_with_labels() -> None:
    rng = np.random.default_rng(8)
    train, labels = _blobs(rng, 1000, 2.0)
    test, truth = _blobs(rng, 500, 2.0)
    ten = few_shot(train, labels, test, truth, per_class=10)
    many = few_shot(train, labels, test, truth, share=0.5)
    assert (ten.labelled, ten.draws) == (50, 5)
    assert many.labelled == pytest.approx(500, abs=5)
    assert ten.std > 0
    assert 0.2 < ten.mean < many.mean
    assert few_shot(train, labels, test, truth, share=0.001).labelled == 5  # at least one a class


def test_few_shot_of_rare_classes_takes_all_there_is() -> None:
    rng = np.random.default_rng(9)
    train, labels = _blobs(rng, 12, 0.1, classes=2)
    assert few_shot(train, labels, train, labels, per_class=10).labelled <= 12
    assert few_shot(train, labels, train, labels, per_class=10).mean == 1.0


def _by_leaving_each_out(
    x: torch.Tensor, labels: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    """Ridge with an intercept: every row is predicted by a fit without it, for each penalty."""
    y = torch.nn.functional.one_hot(labels).double()

    def fit(rows: list[int], penalty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean_x, mean_y = x[rows].mean(dim=0), y[rows].mean(dim=0)
        xc, yc = x[rows] - mean_x, y[rows] - mean_y
        gram = xc.T @ xc + penalty * torch.eye(x.shape[1]).double()
        weight = torch.linalg.solve(gram, xc.T @ yc)
        return weight, mean_y - mean_x @ weight

    everyone = list(range(len(x)))
    penalties = torch.linalg.svdvals(x).max() ** 2 * torch.logspace(-5, 1, 13, dtype=torch.double)
    errors = []
    for penalty in penalties:
        error = 0.0
        for i in everyone:
            weight, offset = fit([j for j in everyone if j != i], penalty)
            error += float(((y[i] - (x[i] @ weight + offset)) ** 2).mean())
        errors.append(error)
    weight, offset = fit(everyone, penalties[int(np.argmin(errors))])
    return (query @ weight + offset).argmax(dim=1)


@pytest.mark.parametrize("rows", [6, 9])
def test_few_shot_leave_one_out_equals_leaving_each_out(rows: int) -> None:
    """The hat-matrix shortcut picks the penalty that refitting without every row picks.

    So few rows that the mean's share in each matters, and queries on which the penalty shows.
    """
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x, labels = map(torch.from_numpy, _blobs(rng, rows, 2.0, classes=3, width=6))
        query = torch.from_numpy(_blobs(rng, 300, 2.0, classes=3, width=6)[0]).double()
        mean = x.double().mean(dim=0)
        x, query = x.double() - mean, query - mean
        assert torch.equal(
            _ridge_predict(x, labels, query), _by_leaving_each_out(x, labels, query)
        ), seed


def test_few_shot_does_not_care_about_scale_and_offset_of_a_feature() -> None:
    """Loud dimensions of noise beside quiet ones that tell the classes apart."""
    rng = np.random.default_rng(12)
    train, labels = _blobs(rng, 300, 0.5)
    test, truth = _blobs(rng, 300, 0.5)
    noise = [rng.normal(size=(300, 12)).astype(np.float32) for _ in range(2)]
    sets = [np.hstack([part, n]) for part, n in zip((train, test), noise, strict=True)]
    scale = np.repeat([1e-2, 1e2], 12).astype(np.float32)
    plain = few_shot(sets[0], labels, sets[1], truth, per_class=10)
    moved = few_shot(
        sets[0] * scale + 5 * scale, labels, sets[1] * scale + 5 * scale, truth, per_class=10
    )
    assert plain.mean > 0.8
    assert moved.mean == pytest.approx(plain.mean, abs=0.01)


def test_a_linear_probe_sees_every_test_row_by_itself() -> None:
    """Rows are standardised by the training set: what else is in their own set changes nothing."""
    rng = np.random.default_rng(13)
    train, labels = _blobs(rng, 300, 1.5)
    test, truth = _blobs(rng, 300, 1.5)
    shifted = test * 0.5 + 1.0
    order = np.argsort(truth, kind="stable")  # parts of one class and of two

    def both(rows: np.ndarray) -> np.ndarray:
        found = linear_probe(
            train, labels, test[rows], truth[rows], shifted=(shifted[rows], truth[rows]), epochs=3
        )
        assert found.shift_accuracy is not None
        return np.array([found.accuracy, found.shift_accuracy])

    whole = both(order)
    assert whole[0] > whole[1] + 0.02
    np.testing.assert_allclose(
        np.mean([both(p) for p in np.split(order, 6)], axis=0), whole, atol=1e-6
    )


def test_probes_refuse_what_they_cannot_score() -> None:
    x, labels = _blobs(np.random.default_rng(11), 20, 1.0)
    with pytest.raises(ValueError, match="unlabelled"):
        knn_accuracy(x, np.full(20, -1), x, labels)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        knn_accuracy(x[:0], labels[:0], x, labels)
    with pytest.raises(ValueError, match="exactly one"):
        few_shot(x, labels, x, labels)


def test_a_task_is_of_motion_if_one_frame_reads_no_more_than_guessing() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 3])  # guessing gets 3 of 10
    assert task_of(0.34, labels) == {"kind": "motion", "chance": 0.3, "single_frame": 0.34}
    assert task_of(0.36, labels)["kind"] == "appearance"
