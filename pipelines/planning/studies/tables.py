"""The lines that `pipelines.plan_episodes` prints of its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.planning.rows import DISTILLED, ROWS, Row
from pipelines.planning.studies.ablations import ABLATIONS, EXAMS
from pipelines.planning.studies.recall import RECALL

Table = Mapping[str, Mapping[str, Any]]
"""What `pipelines.planning.results.rates` returns."""
TITLES = {
    "same": "same room",
    "cross": "across rooms",
    "hidden": "frames hidden",
    "zone": "round a zone",
}
"""Titles of the kinds of episodes."""


def table(results: Mapping[str, Any]) -> list[str]:
    """Returns the lines, for whatever was compared."""
    lines = [*_tuned(results)] if "tuned" in results else []
    if "rows" in results:
        lines += _comparison(results)
    if "ablations" in results:
        lines += ["", "less one module:", *_rates(results["ablations"]["rows"], EXAMS, ABLATIONS)]
    for name in ("budgets", "methods"):
        if name in results:
            lines += ["", "by imagined steps an action:", *_curves(results[name])]
    for budget, found in results.get("recall", {}).items():
        lines += ["", f"memory, with {budget} imagined steps an action:"]
        lines += _rates(found["rows"], ("cross",), RECALL)
    if "distilled" in results:
        lines += ["", *_distilled(results["distilled"])]
    return lines


def _rates(rows: Table, kinds: tuple[str, ...], says: Mapping[str, Row]) -> Iterator[str]:
    yield " " * 18 + "".join(f"{TITLES[kind]:>22}" for kind in kinds)
    for row, of in rows.items():
        cells = "".join(f"{_rate(of[kind]):>22}" for kind in kinds)
        yield f"{row:18}{cells}  {says[row].says}"


def _rate(of: Mapping[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['rate']:.0%} ({low:.0%} to {high:.0%})"


def _comparison(results: Mapping[str, Any]) -> Iterator[str]:
    yield from _rates(results["rows"], ("same", "cross"), ROWS)
    told = ", ".join(f"{row} {s:.2f}" for row, s in results["seconds_per_episode"].items())
    yield f"seconds an episode: {told}"
    for name, errors in results["open_loop_px"].items():
        told = ", ".join(f"{step}: {error:.2f}" for step, error in errors.items())
        yield f"open-loop error in pixels after steps, {name}: {told}"
    for step, of in results.get("disagreement", {}).items():
        told = ", ".join(f"{name} {value:.2f}" for name, value in of.items())
        yield f"AUROC of great errors after {step} steps: {told}"
    for name, of in results["rank_correlation_with_the_way"].items():
        yield f"rank correlation with the way, {name}: {of['all']:.2f}, far apart {of['far']:.2f}"
    for name, says in (("slow_features", "slow features add"), ("critic", "the critic adds")):
        lift = results[name]["cross"]
        low, high = lift["interval"]
        yield f"across rooms {says} {lift['lift']:+.0%} ({low:+.0%} to {high:+.0%})"
    yield from (f"{'pass' if held else 'FAIL'}: {name}" for name, held in results["gate"].items())


def _curves(curves: Table) -> Iterator[str]:
    for kind in ("same", "cross"):
        for row, points in curves.items():
            told = ", ".join(f"{budget}: {of[kind]['rate']:.0%}" for budget, of in points.items())
            yield f"{row:14}{TITLES[kind]}  {told}"
    for row, points in curves.items():
        told = ", ".join(f"{b}: {of['decisions_per_second']:.0f}" for b, of in points.items())
        yield f"{row:14}decisions a second  {told}"


def _distilled(found: Mapping[str, Any]) -> Iterator[str]:
    says = {"ours_critic": ROWS["ours_critic"], "distilled": DISTILLED}
    yield from _rates(found["rows"], ("same", "cross"), says)
    low, high = found["of_planner"]["interval"]
    yield f"the policy reaches {found['of_planner']['share']:.0%} ({low:.0%} to {high:.0%}) of it"
    took = ", ".join(f"{row} {ms:.2f}" for row, ms in found["milliseconds"].items())
    yield f"milliseconds an action: {took}; {found['times_fewer']:.0f} times fewer"


def _tuned(results: Mapping[str, Any]) -> Iterator[str]:
    for candidate in results["tuned"]:
        rules = ", ".join(f"{name} {value}" for name, value in candidate["rules"].items())
        told = f"{candidate['success']:.0%}, {candidate['steps']:.1f} steps"
        yield f"validation: {told}: {candidate['method']}, {rules}"
    for kind, of in results["tuned_gain"].items():
        success, steps = of["success"], of["fewer_steps"]
        yield (
            f"the first of these beside the settings as they were, {TITLES[kind]}: "
            f"success {success['lift']:+.0%} ({success['interval'][0]:+.0%} to "
            f"{success['interval'][1]:+.0%}), {steps['lift']:+.1f} fewer steps "
            f"({steps['interval'][0]:+.1f} to {steps['interval'][1]:+.1f})"
        )
