"""What commit ae55864 wrote, and what it read there: see `write_ae55864.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from old_formats.write_ae55864 import PRESETS

from models.encoders import shape as shapes

FILES = Path(__file__).resolve().parent / "ae55864"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the old files, which a test may add to."""
    return shutil.copytree(FILES, tmp_path_factory.mktemp("old") / FILES.name)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the old code read in them."""
    read: dict[str, Any] = json.loads((FILES / "expected.json").read_text())
    return read


@pytest.fixture(scope="module", autouse=True)
def _presets() -> Iterator[None]:
    """The narrow encoders of the old runs, which no table of presets holds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in PRESETS.items():
            patch.setitem(shapes.PRESETS, name, shapes.Preset(**shape))
        yield
