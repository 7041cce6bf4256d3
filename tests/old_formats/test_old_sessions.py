"""Sessions that a language model of commit ae55864 stored, in a folder and in segments."""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from helpers.lm.serving import cluster, say
from serve.ingress.errors import ApiError
from serve.lm.replica.language_model import LanguageModel
from serve.lm.store.session_store import OtherModel, SessionStore

SNAPSHOTS = {"pinned": 28, "long": 0, "other": 26, "twin": 70}
"""Tokens of each session's newest snapshot; a log that is longer is read from there."""


def store_of(old: Path, kind: str, folder: Path, *, snapshots: bool) -> str:
    """A copy of the stored sessions, at a URI where they can be gone on with."""
    copy = shutil.copytree(old / "lm" / kind, folder / kind)
    if not snapshots:
        for path in copy.glob("*/snapshots"):
            shutil.rmtree(path)
    if kind == "local":
        return str(copy)
    name = uuid.uuid4().hex
    fsspec.filesystem("memory").put(str(copy), f"/{name}", recursive=True)
    return f"memory://{name}"


async def check(replica: LanguageModel, name: str, was: dict[str, Any]) -> None:
    state = await replica.describe_session(name)
    assert not isinstance(state, ApiError), state
    assert (state.stream_position, state.sinks) == (was["position"], was["sinks"])
    assert await say(replica, name, "", max_tokens=len(was["next"])) == was["next"]


@pytest.mark.parametrize("snapshots", [True, False], ids=["snapshots", "log alone"])
@pytest.mark.parametrize("kind", ["local", "segments"])
def test_a_session_goes_on_with_the_tokens_of_the_old_code(
    kind: str, snapshots: bool, old: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    async def test() -> None:
        uri = store_of(old, kind, tmp_path, snapshots=snapshots)
        async with cluster(old / "lm" / "model", store=uri, sessions=2) as made:
            store = SessionStore(uri, (await made.replica.describe()).fingerprint)
            assert store.names() == sorted(SNAPSHOTS)
            for name, was in expected["sessions"].items():
                session = store.open(name, "a test")
                assert session.log.read(0) == was["stream"]
                position, _ = session.newest_snapshot()
                assert position == (SNAPSHOTS[name] if snapshots else 0)
                session.close()
                await check(made.replica, name, was)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_another_format_and_another_model_are_refused(old: Path, tmp_path: Path) -> None:
    uri = store_of(old, "local", tmp_path, snapshots=True)
    path = Path(uri) / "long" / "session.json"
    spec = json.loads(path.read_text())
    store = SessionStore(uri, spec["fingerprint"])
    store.open("long", "a test").close()
    with pytest.raises(OtherModel, match="sink-0000"):
        SessionStore(uri, "sink-0000").open("long", "a test")
    path.write_text(json.dumps(spec | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, known is 1"):
        store.open("long", "a test")
