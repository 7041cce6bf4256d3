"""A small encoder of clips, for the tests that serve one."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.serve.videos import save_clip_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "clips"
    save_clip_artifact(folder)
    return folder
