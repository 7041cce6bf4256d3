"""The rows of the table, each a job for every seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .data import kept_keys
from .encoders import Encoder, adapted, hiding, pretrained, raw_pixels, untrained
from .jobs import once
from .probes import Alignment, Scores, probe_scores, to_every_new
from .settings import EVERYWHERE, NEW, OLD, OTHER_GAME, Settings
from .supervised import Training, supervised_scores

A, MIXED = "A", "A-new"
"""Names of runs."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: a name for files, a title for readers, and how one seed's scores are made."""

    name: str
    title: str
    scores: Callable[[Settings, set[str], int], Scores]
    label_free: bool = False
    """Whether it uses unlabelled new footage or regions, and so counts for the recovered share."""


def run_row(cfg: Settings, row: Row, seed: int) -> dict[str, Any]:
    """Runs a row for one seed, or reads its result."""

    def run() -> dict[str, Any]:
        kept, _ = kept_keys(cfg)
        scores = row.scores(cfg, kept, seed)
        return {"row": row.name, "seed": seed, "settings": cfg.as_json(), "scores": scores}

    return once(result_path(cfg, row, seed), run)


def result_path(cfg: Settings, row: Row, seed: int) -> Any:
    """Where a row's result for one seed is."""
    return cfg.work / "results" / f"{row.name}-s{seed}.json"


def frozen(cfg: Settings, seed: int) -> Encoder:
    """The encoder pretrained on A alone."""
    return pretrained(cfg, A, seed, [f"train/{OLD}"])


def mixed(cfg: Settings, seed: int) -> Encoder:
    """The encoder pretrained on A and the unlabelled footage of all new HUDs, in equal shares."""
    return pretrained(cfg, MIXED, seed, [f"train/{OLD}", *(f"new/{v}" for v in NEW)])


def excluding(cfg: Settings, seed: int) -> Encoder:
    """The encoder that never sees where any of the HUDs is, pretrained on A alone."""
    return pretrained(cfg, "A-exclude", seed, [f"train/{OLD}"], exclude=EVERYWHERE)


def adapted_to(cfg: Settings, seed: int, variant: str) -> Encoder:
    """The frozen encoder of A, adapted to the unlabelled footage of one new HUD."""
    frozen(cfg, seed)
    return adapted(cfg, f"adapted-{variant}", seed, A, f"new/{variant}")


def control(cfg: Settings, seed: int) -> Encoder:
    """The frozen encoder of A, adapted to another game."""
    frozen(cfg, seed)
    return adapted(cfg, "adapted-other", seed, A, f"{OTHER_GAME}/{OLD}")


def _probed(
    make: Callable[[Settings, int], Any], align: Alignment | None = None
) -> Callable[[Settings, set[str], int], Scores]:
    def scores(cfg: Settings, kept: set[str], seed: int) -> Scores:
        return probe_scores(cfg, to_every_new(make(cfg, seed)), kept, seed, align)

    return scores


def _hiding(
    make: Callable[[Settings, int], Encoder],
    align: Alignment | None = None,
    foreign: bool = False,
) -> Callable[[Settings, set[str], int], Scores]:
    def scores(cfg: Settings, kept: set[str], seed: int) -> Scores:
        encoders = {variant: hiding(make(cfg, seed), variant) for variant in NEW}
        return probe_scores(cfg, encoders, kept, seed, align, foreign)

    return scores


def _adapted(
    align: Alignment | None = None, hide: bool = False
) -> Callable[[Settings, set[str], int], Scores]:
    def scores(cfg: Settings, kept: set[str], seed: int) -> Scores:
        encoders = {variant: adapted_to(cfg, seed, variant) for variant in NEW}
        if hide:
            encoders = {variant: hiding(e, variant) for variant, e in encoders.items()}
        return probe_scores(cfg, encoders, kept, seed, align)

    return scores


def _trained(how: Training, index: int) -> Callable[[Settings, set[str], int], Scores]:
    def scores(cfg: Settings, kept: set[str], seed: int) -> Scores:
        return supervised_scores(cfg, how, kept, seed, cfg.labels[index])

    return scores


def rows(cfg: Settings) -> list[Row]:
    """Returns all rows, in the order of the table."""
    found = [
        Row(name="random", title="random weights", scores=_probed(untrained)),
        Row(name="raw", title="raw pixels", scores=_probed(lambda cfg, seed: raw_pixels(cfg))),
    ]
    titles: dict[Training, str] = {
        "plain": "supervised",
        "augmented": "supervised, augmented",
        "pasted": "supervised, augmented, HUDs pasted",
    }
    for how, title in titles.items():
        for index, count in enumerate(cfg.labels):
            found.append(
                Row(name=f"{how}-{count}", title=f"{title}, {count} labels a class",
                    scores=_trained(how, index))
            )  # fmt: skip
    free: list[tuple[str, str, Any]] = [
        ("frozen-mean", "frozen, means aligned", _probed(frozen, "mean")),
        ("frozen-covariance", "frozen, covariances aligned", _probed(frozen, "covariance")),
        ("hiding", "frozen, HUDs left out", _hiding(frozen)),
        ("hiding-mean", "frozen, HUDs left out, means aligned", _hiding(frozen, "mean")),
        ("hiding-covariance", "frozen, HUDs left out, covariances aligned",
         _hiding(frozen, "covariance")),
        ("exclude", "all HUDs left out, also in pretraining", _probed(excluding)),
        ("exclude-mean", "all HUDs left out, also in pretraining, means aligned",
         _probed(excluding, "mean")),
        ("mixed", "pretrained on A and new footage", _probed(mixed)),
        ("mixed-mean", "pretrained on A and new, means aligned", _probed(mixed, "mean")),
        ("mixed-covariance", "pretrained on A and new, covariances aligned",
         _probed(mixed, "covariance")),
        ("adapted", "adapted", _adapted()),
        ("adapted-mean", "adapted, means aligned", _adapted("mean")),
        ("adapted-covariance", "adapted, covariances aligned", _adapted("covariance")),
        ("adapted-hiding-mean", "adapted, HUDs left out, means aligned",
         _adapted("mean", hide=True)),
    ]  # fmt: skip
    found.append(Row(name="frozen", title="frozen, pretrained on A", scores=_probed(frozen)))
    found += [Row(name=n, title=t, scores=s, label_free=True) for n, t, s in free]
    found += [
        Row(name="control", title="control: adapted on another game", scores=_probed(control)),
        Row(name="foreign", scores=_hiding(frozen, "mean", foreign=True),
            title="control: HUDs left out, means aligned by another game's footage"),
        Row(name="random-mean", title="control: random weights, means aligned",
            scores=_probed(untrained, "mean")),
        Row(name="random-hiding-mean", scores=_hiding(untrained, "mean"),
            title="control: random weights, HUDs left out, means aligned"),
    ]  # fmt: skip
    return found
