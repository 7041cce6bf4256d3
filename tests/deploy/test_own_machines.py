"""Ray's local provider accepts cluster.yaml, and systemd and `ray start` accept the units."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private import util
from ray.scripts.scripts import start

from helpers.repository import ROOT

FOLDER = ROOT / "deploy/own_machines"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
FLAGS = {flag for parameter in start.params for flag in parameter.opts}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration as `ray up` completes it, from the root of the checkout."""
    monkeypatch.chdir(ROOT)
    return util.prepare_config(yaml.safe_load((FOLDER / "cluster.yaml").read_text()))


def starts(cluster: dict[str, Any]) -> dict[str, str]:
    return {
        when: next(c for c in cluster[f"{when}_start_ray_commands"] if "ray start" in c)
        for when in ("head", "worker")
    }


def unit(role: str) -> dict[str, list[str]]:
    """Returns the settings of a unit; a key may come several times."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / f"rayjepa-{role}.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def unknown_flags(command: str) -> set[str]:
    words = shlex.split(command.partition("ray start")[2])
    return {word.partition("=")[0] for word in words if word.startswith("--")} - FLAGS


def test_ray_accepts_it_and_uses_every_machine(cluster: dict[str, Any]) -> None:
    util.validate_config(copy.deepcopy(cluster))
    (node_type,) = cluster["available_node_types"].values()
    count = len(cluster["provider"]["worker_ips"])
    assert node_type["min_workers"] == node_type["max_workers"] == count


def test_the_new_autoscaler_is_off_on_the_head(cluster: dict[str, Any]) -> None:
    assert "export RAY_enable_autoscaler_v2=0" in starts(cluster)["head"].partition("ray start")[0]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_start_knows_every_flag(role: str, cluster: dict[str, Any]) -> None:
    assert unknown_flags(starts(cluster)[role]) == set()
    (command,) = unit(role)["ExecStart"]
    assert unknown_flags(command) == set()
    assert unknown_flags("ray start --head --blok") == {"--blok"}


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_start_asks_for_the_token(role: str, cluster: dict[str, Any]) -> None:
    assert "export RAY_AUTH_MODE=token" in starts(cluster)[role].partition("ray start")[0]
    assert unit(role)["EnvironmentFile"] == ["/etc/rayjepa/ray.env"]
    assert "\nRAY_AUTH_MODE=token\n" in (FOLDER / "ray.env").read_text()
    assert "--dashboard-host" not in starts(cluster)[role] + unit(role)["ExecStart"][0]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_a_machine_comes_back_by_itself(role: str) -> None:
    settings = unit(role)
    assert settings["Restart"] == ["always"]
    assert settings["StartLimitIntervalSec"] == ["0"]  # however often
    assert settings["OOMPolicy"] == ["continue"]
    assert "--block" in settings["ExecStart"][0]  # without it systemd would not see it end
    assert settings["User"] == ["ray"]


def test_serve_has_its_time_to_drain() -> None:
    applications = yaml.safe_load((ROOT / "serve/config.yaml").read_text())["applications"]
    drain_s = applications[0]["args"]["drain_s"]
    text = (FOLDER / "ray.env").read_text()
    node_s = re.search(rf"^{DRAIN}=(\d+)$", text, re.M)
    assert node_s is not None
    assert drain_s < int(node_s[1])
    for role in ("head", "worker"):
        assert int(node_s[1]) + 30 < int(unit(role)["TimeoutStopSec"][0])


def test_ray_knows_its_settings() -> None:
    """Those that its Python code reads; of others its C++ core reads the names."""
    text = (FOLDER / "ray.env").read_text()
    names = set(re.findall(r"^#?(RAY_[A-Z_]+)=", text, re.M))
    assert {DRAIN, "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"} <= names
    folder = Path(ray.__file__).parent
    files = ("_private/ray_constants.py", "serve/_private/constants.py", "_private/node.py")
    code = "".join((folder / file).read_text() for file in files)
    assert {name for name in names if name not in code} == {"RAY_AUTH_MODE"}  # read in the core


def test_the_environment_names_what_the_units_use() -> None:
    text = (FOLDER / "ray.env").read_text()
    settable = set(re.findall(r"^#?([A-Za-z_]+)=", text, re.M))
    used = {name for role in ("head", "worker") for name in variables(unit(role)["ExecStart"][0])}
    assert used == {"RAYJEPA_HEAD", "RAYJEPA_HEAD_OPTIONS"}
    assert used <= settable
    options = re.search(r"^#RAYJEPA_HEAD_OPTIONS=(.*)$", text, re.M)
    assert options is not None
    assert unknown_flags(f"ray start {options[1]}") == set()


def variables(command: str) -> set[str]:
    return set(re.findall(r"\$\{?(\w+)", command))


SCRIPTS = sorted([*FOLDER.glob("*.sh"), *(ROOT / "deploy/aws").glob("*.sh")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_stop_at_errors(path: Path) -> None:
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
