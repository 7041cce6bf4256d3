"""The dashboard and the alerts ask for metrics that Ray and our code export."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import ray
import yaml

from helpers.repository import ROOT

FOLDER = ROOT / "deploy/monitoring"
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def metrics_of(source: str) -> dict[str, set[str]]:
    """Returns the series that Prometheus gets of every metric that a source file declares."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
            continue
        name, kind = node.args[0], node.func.id
        if kind in SUFFIXES and isinstance(name, ast.Constant):
            found[str(name.value)] = {f"{name.value}{suffix}" for suffix in SUFFIXES[kind]}
    return found


def ours() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "serve").rglob("*.py")):
        found |= metrics_of(path.read_text())
    return found


def asked(text: str, prefix: str) -> set[str]:
    return set(re.findall(rf"\b{prefix}_[a-z0-9_]+", text))


def expressions() -> str:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    told = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return "\n".join(told + [rule["expr"] for rule in rules()])


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_metrics_of_ours_are_declared_in_the_code() -> None:
    declared = ours()
    assert len(declared) > 15
    assert asked(expressions(), "rayjepa") <= set().union(*declared.values())


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    text = "\n".join(t["expr"] for panel in board["panels"] for t in panel["targets"])
    missing = {name for name, series in ours().items() if not series & asked(text, "rayjepa")}
    assert missing == set()


def test_a_counter_without_its_suffix_is_found() -> None:
    declared = metrics_of('a = Counter("rayjepa_a", "what")\nb = Gauge("rayjepa_b", "what")')
    assert declared == {"rayjepa_a": {"rayjepa_a_total"}, "rayjepa_b": {"rayjepa_b"}}
    assert not asked("rate(rayjepa_a[5m])", "rayjepa") <= set().union(*declared.values())


def test_rays_metrics_are_those_of_its_own_dashboards_and_of_serve() -> None:
    ray_folder = Path(ray.__file__).parent
    panels = sorted(ray_folder.glob("dashboard/modules/metrics/dashboards/*_panels.py"))
    text = "\n".join(path.read_text() for path in panels)
    of_serve = (ray_folder / "serve/_private/deployment_state.py").read_text()
    text += "".join(f"ray_{name} " for name in re.findall(r'"(serve_deployment_\w+)"', of_serve))
    labels = {"ray_train_run_name"}
    for prefix in ("ray", "autoscaler"):
        known = asked(text, prefix)
        assert known
        assert asked(expressions(), prefix) - labels <= known


def test_every_alert_says_what_to_do_and_stands_in_the_runbook() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "action"}
    told = re.findall(r"^\| `([A-Z]\w+)` \|", (ROOT / "docs/runbook.md").read_text(), re.M)
    assert sorted(told) == sorted(names)


def test_prometheus_scrapes_the_jobs_that_the_alerts_name() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert set(re.findall(r'job="(\w+)"', expressions())) == jobs
    assert all((FOLDER / name).is_file() for name in config["rule_files"])


def test_panels_do_not_overlap() -> None:
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["title"] for panel in panels})
