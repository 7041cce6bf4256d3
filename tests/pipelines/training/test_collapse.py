"""RankMe, spread and cosine against direct computation, and the bounds of the verdict."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines.config.train import WatchConfig
from pipelines.evaluation.ranks import rankme
from pipelines.training.collapse import CollapseWatch, MeanMeter

CPU = torch.device("cpu")


def _features(rows=400, dim=24, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(1, 0.1, dim)
    return torch.randn(rows, dim, generator=generator) * scales + mean


def _watch(**overrides):
    return CollapseWatch(WatchConfig(**overrides), dim=24)


def test_rankme_of_known_spectra():
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    one_direction = torch.outer(torch.randn(50), torch.randn(16))
    assert rankme(one_direction) == pytest.approx(1, abs=1e-3)
    # Singular values 2, 1, 1: p = 1/2, 1/4, 1/4, whose entropy is 1.5 ln 2.
    assert rankme(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(2**1.5, rel=1e-4)


def test_a_large_mean_hides_in_the_papers_rankme_and_not_in_the_centred_one():
    features = _features(mean=100.0)
    assert rankme(features) < 2
    assert rankme(features, centred=True) > 15


def test_reading_equals_direct_computation():
    features = _features(mean=0.3)
    watch = _watch()
    watch.update(features)
    reading = watch.reading()
    assert reading["rankme"] == pytest.approx(rankme(features), rel=1e-6)
    assert reading["rankme_centred"] == pytest.approx(rankme(features, centred=True), rel=1e-6)
    assert reading["std"] == pytest.approx(float(features.double().std(dim=0).mean()), rel=1e-9)
    assert reading["cosine"] == pytest.approx(_mean_cosine(features), rel=1e-9)


def test_several_steps_read_as_the_paper_over_all_rows_and_as_spread_within_steps():
    features = _features(mean=0.3)
    pieces = features.split(97)  # the last piece is shorter
    watch = _watch()
    for piece in pieces:
        watch.update(piece)
    reading = watch.reading()
    assert reading["rankme"] == pytest.approx(rankme(features), rel=1e-6)
    centred = torch.cat([piece - piece.double().mean(dim=0) for piece in pieces])
    assert reading["rankme_centred"] == pytest.approx(rankme(centred), rel=1e-6)
    std = (centred.square().sum(dim=0) / (len(features) - len(pieces))).sqrt().mean()
    assert reading["std"] == pytest.approx(float(std), rel=1e-9)
    pairs = torch.tensor([float(len(p) * (len(p) - 1)) for p in pieces])
    cosines = torch.tensor([_mean_cosine(piece) for piece in pieces])
    mean = float((cosines * pairs).sum() / pairs.sum())
    assert reading["cosine"] == pytest.approx(mean, rel=1e-5)


def test_a_collapsed_encoder_that_drifts_from_step_to_step_is_still_collapsed():
    watch = _watch(patience=1, grace_steps=0)
    for step in range(10):
        watch.update(_features(1, seed=step).expand(32, 24))
    message = watch.judge(watch.reading(), step=10)
    assert all(flag in message for flag in ("min-rankme", "min-std", "max-cosine"))


def _mean_cosine(features):
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosines = unit @ unit.T
    return float(cosines[~torch.eye(len(features), dtype=torch.bool)].mean())


def test_a_reading_resets_the_watch_and_an_empty_one_gives_no_verdict():
    watch = _watch(patience=1, grace_steps=0)
    watch.update(torch.ones(8, 24))
    watch.reading()
    watch.update(_features())
    assert watch.reading()["rankme_centred"] > 15
    assert watch.reading() == {}
    watch.update(_features(1))  # one row has no pairs and no spread
    assert watch.reading() == {}
    assert watch.judge({}, step=100) is None


@pytest.mark.parametrize(
    ("features", "flag"),
    [
        (torch.ones(64, 24) * 3, "--watch.min-std"),
        (torch.ones(64, 24) + 1e-6 * _features(64), "--watch.min-std"),
        (torch.outer(torch.linspace(1, 2, 64), torch.ones(24)), "--watch.min-rankme"),
        (100 + 0.01 * _features(64), "--watch.max-cosine"),
        (torch.full((64, 24), float("nan")), "nan"),
    ],
    ids=["constant", "rounding noise", "one direction", "same direction", "not a number"],
)
def test_the_verdict_names_the_flag_of_each_kind_of_collapse(features, flag):
    watch = _watch(patience=1, grace_steps=0)
    watch.update(features)
    message = watch.judge(watch.reading(), step=7)
    assert message is not None
    assert flag in message
    assert "step 7" in message


def test_embeddings_are_read_under_their_own_name_and_by_their_first_columns():
    watch = CollapseWatch(WatchConfig(patience=1, grace_steps=0), dim=24, of="embedded")
    watch.update(torch.cat([torch.ones(64, 24), _features(64)], dim=1))
    reading = watch.reading()
    assert set(reading) == {f"embedded_{k}" for k in ("rankme", "rankme_centred", "std", "cosine")}
    message = watch.judge(reading, step=7)
    assert message is not None
    assert message.startswith("the embeddings have collapsed at step 7")


def test_healthy_features_are_not_called_collapsed_even_with_a_large_mean():
    watch = _watch(patience=1, grace_steps=0)
    watch.update(_features(mean=5.0))
    assert watch.judge(watch.reading(), step=7) is None


def test_patience_counts_readings_in_a_row_and_grace_is_not_judged():
    watch = _watch(patience=2, grace_steps=20)
    bad = {"rankme": 1.0, "rankme_centred": 1.0, "std": 0.0, "cosine": 1.0}
    good = {"rankme": 9.0, "rankme_centred": 9.0, "std": 1.0, "cosine": 0.1}
    assert watch.judge(bad, step=10) is None
    assert watch.judge(bad, step=20) is None
    assert watch.judge(bad, step=30) is None  # first that counts
    assert watch.judge(good, step=40) is None  # forgiven
    assert watch.judge(bad, step=50) is None
    assert watch.judge(bad, step=60) is not None


def test_saved_halves_read_as_the_uninterrupted_whole_bitwise():
    features = _features()
    whole, first, second = _watch(), _watch(), _watch()
    for piece in features.split(100):
        whole.update(piece)
    for piece in features[:200].split(100):
        first.update(piece)
    second.load([first.state()])
    for piece in features[200:].split(100):
        second.update(piece)
    assert second.reading() == whole.reading()


def test_states_of_two_processes_are_added_up():
    features = _features()
    whole, left, right, folded = _watch(), _watch(), _watch(), _watch()
    whole.update(features[:150])
    whole.update(features[150:])
    left.update(features[:150])
    right.update(features[150:])
    folded.load([left.state(), right.state()])
    ours, theirs = folded.reading(), whole.reading()
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_reading_is_of_all_processes_together(monkeypatch):
    features = _features()
    whole, here, there = _watch(), _watch(), _watch()
    for watches, part in (((whole, here), features[:150]), ((whole, there), features[150:])):
        for watch in watches:
            watch.update(part)
    other = torch.cat([moment.flatten() for moment in there.state().values()])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(other))
    ours = here.reading()
    monkeypatch.undo()
    assert ours == pytest.approx(whole.reading(), rel=1e-9)
    assert ours != pytest.approx(there.reading(), rel=1e-2)  # what one process alone would say


def test_mean_meter_means_saves_and_folds():
    meter, other = MeanMeter(), MeanMeter()
    assert meter.reading() == {}
    meter.update({"loss": torch.tensor(1.0), "a": torch.tensor(5.0)})
    other.load([meter.state(), meter.state()], CPU)
    other.update({"loss": torch.tensor(4.0), "a": torch.tensor(5.0)})
    assert other.reading() == {"loss": 2.0, "a": 5.0}
    assert other.reading() == {}
    assert math.isclose(meter.reading()["loss"], 1.0)
