"""Ray Train's set-up of torch's processes, which meet at the addresses of their nodes."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipelines.worker_group.interface import use_address_of_node


class NodeBackend(_TorchBackend):
    """Chooses gloo's interface in every worker before torch's processes meet."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called by Ray Train's controller when all workers of a group are there."""
        worker_group.execute(use_address_of_node)
        super().on_start(worker_group, backend_config)


class NodeTorchConfig(TorchConfig):
    """A TorchConfig whose workers reach each other by the addresses of their nodes."""

    @property
    def backend_cls(self) -> type[NodeBackend]:
        """Called by Ray Train."""
        return NodeBackend
