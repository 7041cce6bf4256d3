"""Numbers in the documents that the code knows."""

from __future__ import annotations

import re

import models.artifacts.alignment
import models.artifacts.formats.rayjepa
import models.beliefs.stored
import pipelines.dataset.shards
import pipelines.embed
import pipelines.runs.checkpoints
import serve.lm.store.session_store
from helpers.repository import ROOT

DOCS = ROOT / "docs"
VERSIONS = {
    "shards": pipelines.dataset.shards.SCHEMA_VERSION,
    "checkpoint": pipelines.runs.checkpoints.FORMAT,
    "artifact": models.artifacts.formats.rayjepa.SCHEMA_VERSION,
    "embeddings": pipelines.embed.SCHEMA_VERSION,
    "alignment": models.artifacts.alignment.SCHEMA_VERSION,
    "surprise": models.beliefs.stored.SCHEMA_VERSION,
    "stored session of the language model": serve.lm.store.session_store.FORMAT,
}


def test_the_table_of_versions_is_the_codes() -> None:
    table = (DOCS / "architecture.md").read_text().partition("### Versions on disk")[2]
    rows = re.findall(r"^\| ([^|]+) \| [^|]*`[^|]* \| (\d+) \|$", table.partition("###")[0], re.M)
    assert {name: int(number) for name, number in rows} == VERSIONS


def test_the_page_on_checkpoints_says_their_format() -> None:
    text = (DOCS / "checkpoints.md").read_text()
    said = re.findall(r"`format` in `state\.json` is (\d+)", text)
    assert said == [str(pipelines.runs.checkpoints.FORMAT)]
