"""A worker that is lost while the workers start counts as a failure, and the run starts again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError

from helpers.pipelines.fake_training import change, tiny_config
from helpers.pipelines.loading import write_samples
from pipelines.config.train import PretrainConfig
from pipelines.training import launch
from pipelines.training.contract import Outcome


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """A run with two failures; nothing starts Ray."""
    monkeypatch.setattr(launch, "start_ray", lambda *_, **__: None)
    monkeypatch.setattr(launch, "check_fits", lambda *_: None)
    data = write_samples(tmp_path / "shards")
    tiny = tiny_config(tmp_path / "runs", name="run")
    return change(tiny, data={"train": data}, run={"max_failures": 2})


def trained(
    cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch, errors: list[Exception]
) -> tuple[list[int], str]:
    """Runs `pretrain` with fits that raise these errors one after the other, then go well.

    Returns:
        The failures that each fit was allowed, and what was printed.
    """
    allowed: list[int] = []

    def fit(cfg: PretrainConfig, *_: object) -> Outcome:
        allowed.append(cfg.run.max_failures)
        if errors:
            raise errors.pop(0)
        return Outcome(3, {}, taken_over="the end of the test")

    monkeypatch.setattr(launch, "_fit", fit)
    shown = io.StringIO()
    with pytest.raises(launch.RunInUseError, match="the end of the test"):
        launch.pretrain(cfg, stream=shown)
    return allowed, shown.getvalue()


def lost() -> ControllerError:
    return ControllerError(ActorDiedError())


def test_it_starts_again_and_may_fail_less_often(
    cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, shown = trained(cfg, monkeypatch, [lost(), lost()])
    assert allowed == [2, 1, 0]
    assert shown.count("a worker was lost while the workers started") == 2


def test_without_a_limit_it_goes_on(cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = change(cfg, run={"max_failures": -1})
    assert trained(unlimited, monkeypatch, [lost() for _ in range(5)])[0] == [-1] * 6


@pytest.mark.parametrize(
    ("failures", "error"), [(0, lost()), (2, ControllerError(ValueError("a bug")))]
)
def test_it_ends_when_no_failure_is_left_or_it_is_another_error(
    cfg: PretrainConfig, monkeypatch: pytest.MonkeyPatch, failures: int, error: ControllerError
) -> None:
    with pytest.raises(ControllerError):
        trained(change(cfg, run={"max_failures": failures}), monkeypatch, [error])
