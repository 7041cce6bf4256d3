"""Folders stand in an order and import only lower ones; none holds more than twelve modules."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.repository import ROOT

MOST_MODULES = 12
UNLIMITED = {"pipelines"}
"""Folders of commands, of which there may be any number."""

# Lowest first. A folder imports its own modules and those of the folders above its line here.
# A module named by itself stands at a place of its own.
ORDER = [
    "models/keyed_random",
    "models",
    "models/media/pictures",
    "models/media/video",
    "models/media",
    "models/encoders",
    "models/artifacts/formats",
    "models/artifacts",
    "models/objectives",
    "models/beliefs",
    "models/planning/worlds",
    "models/planning/world_model",
    "models/planning/descent",
    "models/planning/memory",
    "models/planning/pairs",
    "models/planning/actors",
    "models/planning/costs",
    "models/planning",
    "models/hyperoptim",
    "models/sink_lm/kernels",
    "models/sink_lm/network",
    "models/sink_lm",
    "models/sink_lm/checkpoints",
    "models/sink_lm/engine",
    "pipelines/config",
    "pipelines/recipes",
    "pipelines/runtime/lines",
    "pipelines/runtime",
    "pipelines/worker_group",
    "pipelines/dataset",
    "pipelines/ingestion/entries",
    "pipelines/ingestion/listing",
    "pipelines/ingestion/reading",
    "pipelines/ingestion/sources",
    "pipelines/ingestion/preparing",
    "pipelines/ingestion",
    "pipelines/loading/masks",
    "pipelines/loading",
    "pipelines/runs",
    "pipelines/evaluation",
    "pipelines/planning",
    "pipelines/planning/studies",
    "pipelines/evaluation/probes",
    "pipelines/evaluation/blocks",
    "pipelines/evaluation/beliefs",
    "pipelines/evaluation/report",
    "pipelines/training/probes",
    "pipelines/training",
    "pipelines/sweeps",
    "pipelines/capacity",
    "pipelines/fetchers/games",
    "pipelines/planning/games",
    "pipelines/fetchers",
    "serve/telemetry",
    "serve/ingress",
    "serve/replicas",
    "serve/embeddings",
    "serve/embeddings/media",
    "serve/embeddings/replica",
    "serve/embeddings/streams",
    "serve/embeddings/frontend",
    "serve/planning",
    "serve/planning/replica",
    "serve/planning/frontend",
    "serve/lm",
    "serve/lm/store",
    "serve/lm/replica",
    "serve/lm/frontend",
    "serve",
    "pipelines",
]
RANK = {place: rank for rank, place in enumerate(ORDER)}
PACKAGES = ("models", "pipelines", "serve")


def modules() -> dict[str, Path]:
    """Returns every module of ours by its dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {dotted(path): path for path in paths}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def place_of(path: Path) -> str:
    """Returns the place in the order of a module: its own where it has one, else its folder's."""
    relative = path.relative_to(ROOT)
    own = relative.with_suffix("").as_posix()
    return own if own in RANK else relative.parent.as_posix()


def imported(source: str, known: dict[str, Path]) -> Iterator[str]:
    """Yields the dotted names of our modules that a source text imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        yield from (name for name in names if name in known)


def upward(place: str, source: str, known: dict[str, Path]) -> list[str]:
    """Returns the imports of a source text at a place that go to a higher place."""
    return [
        name
        for name in imported(source, known)
        if place_of(known[name]) != place and RANK[place_of(known[name])] > RANK[place]
    ]


def test_every_folder_has_its_place_in_the_order() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in modules().values()}
    assert folders == {place for place in ORDER if (ROOT / place).is_dir()}
    assert all((ROOT / f"{place}.py").is_file() for place in ORDER if place not in folders)


def test_no_folder_imports_a_higher_one() -> None:
    known = modules()
    found = {
        dotted(path): names
        for path in known.values()
        if (names := upward(place_of(path), path.read_text(), known))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("models/encoders", "from models.artifacts.artifact import load_artifact"),
        ("pipelines/dataset", "def f():\n    from pipelines.training import trainer"),
        ("serve/ingress", "import serve.app"),
    ],
)
def test_an_import_upwards_is_seen(place: str, source: str) -> None:
    assert len(upward(place, source, modules())) == 1


def test_no_folder_holds_more_than_twelve_modules() -> None:
    paths = [path for path in modules().values() if path.name != "__init__.py"]
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in paths)
    limited = {folder: n for folder, n in counts.items() if folder not in UNLIMITED}
    assert {folder: n for folder, n in limited.items() if n > MOST_MODULES} == {}


def test_the_init_of_a_folder_is_a_docstring_alone() -> None:
    """What a folder offers is imported from the module where it stands."""
    full = []
    for path in modules().values():
        body = ast.parse(path.read_text()).body
        docstring = len(body) == 1 and isinstance(body[0], ast.Expr)
        if path.name == "__init__.py" and not docstring:
            full.append(path.relative_to(ROOT).as_posix())
    assert full == []
