"""A reader does not wait for a dead replica because another one answers in its place."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.waiting import LIMIT_S
from serve.lm.frontend import client as lm_client
from serve.lm.frontend.client import LMClient


class Handle:
    """A handle of replicas: the one of the answer is silent, others answer everything at once."""

    def __init__(self, method: str = "") -> None:
        self._method = method

    def options(self, *, session_id: str, method_name: str) -> Handle:
        return Handle(method_name)

    async def remote(self, *_: Any, **__: Any) -> Any:
        if self._method == "take":
            await asyncio.Event().wait()
        return "from another replica"


class Busy:
    """A replica that takes a while for every call, and dies with the first if it is told to."""

    def __init__(self, *, dies: bool) -> None:
        self.calls: list[str] = []
        self._dies = dies

    def options(self, *, session_id: str, method_name: str) -> Any:
        async def works_on(call_id: str) -> bool:
            return call_id in self.calls[1:] or not self._dies

        async def snapshot(*_: Any, call_id: str) -> str:
            self.calls.append(call_id)
            await asyncio.sleep(2 * LIMIT_S if self._dies and len(self.calls) == 1 else 0.1)
            return f"answer to call {len(self.calls)}"

        return SimpleNamespace(remote=works_on if method_name == "works_on" else snapshot)


def test_the_answer_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_client, "TAKE_WAIT_S", 0.01)
    client = LMClient(Handle(), persistent=True, silence_s=0.01)
    assert asyncio.run(asyncio.wait_for(client.take("key", "request"), LIMIT_S)) is None


@pytest.mark.parametrize(("dies", "calls"), [(False, 1), (True, 2)])
def test_a_call_is_repeated_when_the_one_who_answers_pings_does_not_work_on_it(
    dies: bool, calls: int
) -> None:
    replica = Busy(dies=dies)
    client = LMClient(replica, persistent=True, silence_s=0.02)
    answer = asyncio.run(asyncio.wait_for(client.call("key", "snapshot", "key"), LIMIT_S))
    assert answer == f"answer to call {calls}"
    assert len(set(replica.calls)) == calls
