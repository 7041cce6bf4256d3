"""The project holds together: import direction, names, dependencies, README and .ci/run agree."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers.repository import ROOT

PACKAGES = ("models", "pipelines", "serve")
# pipelines -> models <- serve
MAY_IMPORT = {
    "models": {"models"},
    "pipelines": {"pipelines", "models"},
    "serve": {"serve", "models"},
}
OURS = {*PACKAGES, "tests", "benchmarks"}
# Runs every job and the endpoint, one after the other: the one file above both sides.
DEMO = Path("pipelines/demo.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def source_files() -> list[Path]:
    return [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yields (line, top-level package) of every import; a relative one counts as `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").partition(".")[0] if not node.level else package


def forbidden_imports(source: str, package: str) -> list[str]:
    allowed = MAY_IMPORT[package]
    return [
        f"line {line} imports {name}"
        for line, name in imported(source, package)
        if name in OURS - allowed
    ]


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_direction(path: Path) -> None:
    source, relative = path.read_text(), path.relative_to(ROOT)
    found = forbidden_imports(source, relative.parts[0])
    assert [f for f in found if relative != DEMO or not f.endswith("imports serve")] == []
    assert "pipelines.demo" not in source.replace("python -m pipelines.demo", "")


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("models", "import pipelines.config"),
        ("models", "def f():\n    from serve import app"),
        ("serve", "from pipelines.config import EmbedConfig"),
        ("pipelines", "if True:\n    import serve.app as a"),
        ("pipelines", "from tests.conftest import ROOT"),
    ],
)
def test_import_direction_sees_violations(package: str, source: str) -> None:
    assert len(forbidden_imports(source, package)) == 1


def test_import_direction_allows_models_rays_serve_and_relative() -> None:
    source = "from models.encoders import vit\nfrom ray import serve as s\nfrom . import config"
    assert forbidden_imports(source, "pipelines") == []


def test_models_do_not_use_ray_and_config_uses_nothing_heavy() -> None:
    light = {"pipelines", "models", "tyro", "fsspec"}
    for path in sorted((ROOT / "models").rglob("*.py")):
        assert "ray" not in {name for _, name in imported(path.read_text(), "models")}, path
    for path in sorted((ROOT / "pipelines/config").glob("*.py")):
        names = {name for _, name in imported(path.read_text(), "pipelines")}
        assert names <= {*sys.stdlib_module_names, *light}, path
        ours = re.findall(r"(?:from|import) (pipelines\S*)", path.read_text())
        assert {".".join(name.split(".")[:2]) for name in ours} <= {"pipelines.config"}, path


def test_no_module_shadows_the_standard_library_or_is_called_utils() -> None:
    names = {p.stem for p in source_files()} | {p.parent.name for p in source_files()}
    assert names & (set(sys.stdlib_module_names) | {"utils", "ray", "torch"}) == set()


def test_every_module_imports_without_starting_ray() -> None:
    import ray

    before = ray.is_initialized()
    for path in source_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
    assert ray.is_initialized() == before


def test_http_ingress_and_decoders_start_without_torch() -> None:
    """It would triple the time to start one, and their memory."""
    modules = "serve.app, serve.planning_app, serve.embeddings.media.decode_worker"
    modules += ", models.media.preprocessing"
    assert_imports_none(modules, "torch", "timm")


def test_configuration_starts_without_torch_and_ray() -> None:
    """Every read task and every `--help` imports it."""
    assert_imports_none("pipelines.config.train, pipelines.config.jobs", "torch", "timm", "ray")


def assert_imports_none(modules: str, *heavy: str) -> None:
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_setuptools_lists_every_package_and_the_data_files_exist() -> None:
    folders = {p.parent.relative_to(ROOT) for p in source_files()}
    assert {".".join(f.parts) for f in folders} == set(PROJECT["tool"]["setuptools"]["packages"])
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package).glob(pattern)), f"{package}: nothing matches {pattern}"


# Dependencies


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def declared() -> list[Requirement]:
    project = PROJECT["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    return [Requirement(r) for r in project["dependencies"] + extras]


def test_constraints_are_plain_sorted_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"#.*|[a-z0-9-]+==[0-9][0-9a-z.]*", line), line
    assert names == sorted(set(names))
    assert names == [canonicalize_name(n) for n in names]


def test_constraints_satisfy_every_declared_dependency() -> None:
    for requirement in declared():
        version = pins()[canonicalize_name(requirement.name)]
        assert Version(version) in requirement.specifier, requirement


def test_constraints_cover_what_the_dependencies_depend_on() -> None:
    # From the metadata of what is installed here; of packages at another version than the pinned
    # one, the dependencies may differ and are not followed.
    pinned, seen = pins(), set()
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in declared()]
    while todo:
        name, extras = todo.pop()
        assert name in pinned, f"constraints.txt lacks {name}"
        if (name, extras) in seen or not _installed(name, pinned[name]):
            continue
        seen.add((name, extras))
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            ):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert len(seen) > 5


def _installed(name: str, version: str) -> bool:
    try:
        return Version(importlib.metadata.version(name)).public == version
    except importlib.metadata.PackageNotFoundError:
        return False


def test_stated_version_ranges() -> None:
    torch = next(r for r in declared() if r.name == "torch").specifier
    assert all(v in torch for v in ("2.11.0", "2.15.0"))
    assert all(v not in torch for v in ("2.10.0", "2.16.0"))
    python = Requirement("x" + PROJECT["project"]["requires-python"]).specifier
    assert [v for v in ("3.10", "3.11", "3.12", "3.13", "3.14") if v in python] == [
        "3.11",
        "3.12",
        "3.13",
    ]


# Documents, README and .ci/run


def documents() -> list[Path]:
    folders = (ROOT, ROOT / "docs", *(ROOT / "benchmarks").glob("**/"))
    return [path for folder in folders for path in sorted(folder.glob("*.md"))]


def test_documents_that_text_and_code_point_to_exist() -> None:
    for path in [*documents(), *source_files(), ROOT / "cluster.yaml"]:
        for name in re.findall(r"(?<!/)\bdocs/[a-z_]+\.md", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} points to {name}"


def test_links_between_documents_work() -> None:
    for path in documents():
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.relative_to(ROOT)} links to {link}"


MAIN_JOB = "pip install -e . -c constraints.txt && python -m pipelines.demo"
TESTS = 'pip install -e ".[test]" -c constraints.txt && pytest'


def test_readme_prints_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert MAIN_JOB in lines
    assert TESTS in lines


@pytest.fixture
def ci(tmp_path: Path) -> Path:
    """A checkout that holds only .ci/run and README.md, and stub tools that log their arguments."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    (tmp_path / "bin").mkdir()
    for tool in ("python3.11", "python", "pip", "pytest", "ruff", "mypy", "apt-get"):
        stub = tmp_path / "bin" / tool
        stub.write_text(f'#!/bin/sh\necho "{tool} $*" >> log\ntest "$FAIL" != {tool}\n')
        stub.chmod(0o755)
    return tmp_path


def run_ci(ci: Path, fail: str = "") -> tuple[int, str]:
    env = {"PATH": f"{ci / 'bin'}:{os.environ['PATH']}", "FAIL": fail, "TMPDIR": str(ci)}
    done = subprocess.run([ci / ".ci/run"], env=env, capture_output=True, text=True, check=False)
    return done.returncode, (ci / "log").read_text() + done.stdout


def test_ci_runs_the_readmes_test_command_then_lint_types_and_the_cluster(ci: Path) -> None:
    code, log = run_ci(ci)
    assert code == 0, log
    calls = (ci / "log").read_text().splitlines()
    calls = [call for call in calls if not call.startswith("apt-get")]  # which needs root
    assert calls[0].startswith("python3.11 -m venv ")
    assert calls[1:-1] == [
        "pip install -e .[test] -c constraints.txt",
        "pytest ",
        "ruff check .",
        "ruff format --check .",
        "mypy ",
        "pytest -n 0 -rs tests/cluster",
    ]
    assert list(ci.glob("tmp.*")) == []  # the venv is gone


@pytest.mark.parametrize("tool", ["pip", "pytest", "ruff", "mypy"])
def test_ci_fails_when_any_step_fails_and_still_runs_the_rest(ci: Path, tool: str) -> None:
    code, log = run_ci(ci, fail=tool)
    assert code == 1
    assert "FAILED" in log
    assert "mypy " in log


def test_ci_fails_without_the_command_in_the_readme(ci: Path) -> None:
    (ci / "README.md").write_text("pip install rayjepa\n")
    (ci / "log").touch()
    assert run_ci(ci)[0] == 2
