"""A Serve application without a model: two replicas, each of which answers with its pid."""

from __future__ import annotations

import asyncio
import os

from ray import serve as ray_serve


@ray_serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.5})
class Answering:
    def __init__(self) -> None:
        self._pid = os.getpid()

    async def __call__(self, request: object) -> str:
        await asyncio.sleep(0.5)  # so that some are under way whenever something happens
        return str(self._pid)


app = Answering.bind()
