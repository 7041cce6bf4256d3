"""deploy/Dockerfile, read as text: nothing here builds an image."""

from __future__ import annotations

import re
import tomllib

from helpers.repository import ROOT

INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Returns (instruction, arguments) of a Dockerfile, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.M)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines if line.strip()]


FOUND = instructions((ROOT / "deploy/Dockerfile").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def of(name: str) -> list[str]:
    return [arguments for instruction, arguments in FOUND if instruction == name]


def test_every_line_is_an_instruction() -> None:
    assert {instruction for instruction, _ in FOUND} <= INSTRUCTIONS
    assert FOUND[0][0] == "FROM"
    assert instructions("RUN a \\\n  # why\n  b\n") == [("RUN", "a    b")]


def test_python_is_that_of_the_constraints() -> None:
    made_on = re.search(r"Python (3\.\d+)", (ROOT / "constraints.txt").read_text())
    assert made_on is not None
    assert of("FROM") == [f"python:{made_on[1]}-slim"]


def test_every_installation_is_constrained_and_keeps_no_cache() -> None:
    runs = [command for run in of("RUN") for command in re.split(r"&&|;|then", run)]
    pips = [command for command in runs if "pip install" in command]
    assert len(pips) == 3
    assert all("-c constraints.txt" in command for command in pips)
    apt = [run for run in of("RUN") if "apt-get install" in run]
    assert all("--no-install-recommends" in run and "rm -rf /var/lib/apt" in run for run in apt)


def test_it_copies_the_packages_and_the_context_holds_nothing_else() -> None:
    copied = {path.rstrip("/") for arguments in of("COPY") for path in arguments.split()[:-1]}
    packages = {p.partition(".")[0] for p in PROJECT["tool"]["setuptools"]["packages"]}
    assert copied == packages | {"pyproject.toml", "constraints.txt", "README.md"}
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert "*" in rules
    assert allowed == copied


def test_nothing_runs_as_root() -> None:
    names = [name for name, _ in FOUND]
    assert of("USER") == ["ray"]
    assert "RUN" not in names[names.index("USER") :]
    assert any(
        "--uid 1000" in run for run in of("RUN")
    )  # fsGroup and runAsUser of deploy/kubernetes
