"""A reader does not wait for a dead replica because another one answers in its place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.lm.frontend import client as lm_client
from serve.lm.frontend.client import LMClient


class Handle:
    """A handle of replicas: the one of the answer is silent, others answer everything at once."""

    def __init__(self, method: str = "") -> None:
        self._method = method

    def options(self, *, session_id: str, method_name: str) -> Handle:
        return Handle(method_name)

    async def remote(self, *_: Any) -> str:
        if self._method == "take":
            await asyncio.Event().wait()
        return "from another replica"


def test_the_answer_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_client, "TAKE_WAIT_S", 0.01)
    client = LMClient(Handle(), persistent=True, silence_s=0.01)
    assert asyncio.run(asyncio.wait_for(client.take("key", "request"), 5)) is None
