"""Ray Train's trainer with our policies for scaling and failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import ScalingConfig  # `ray.train`'s is typed as V1

from pipelines.config.train import PretrainConfig
from pipelines.worker_group.failures import Failures
from pipelines.worker_group.group import GroupWatch
from pipelines.worker_group.scaling import ElasticGroup, FixedGroup, grow_every_s


def scaling_of(cfg: PretrainConfig) -> Any:
    """Returns how many workers a run has, and what each of them reserves."""
    sizes = cfg.group_sizes
    return ScalingConfig(
        num_workers=(sizes[0], sizes[-1]) if cfg.run.elastic else sizes[0],
        use_gpu=cfg.run.gpu,
        resources_per_worker={"CPU": cfg.run.cpus_per_worker} | ({"GPU": 1} if cfg.run.gpu else {}),
        elastic_resize_monitor_interval_s=grow_every_s(),
    )


def group_watch(cfg: PretrainConfig, say: Callable[[str], None]) -> GroupWatch:
    """Returns the callback that knows the group of a run.

    Args:
        cfg: The run.
        say: Takes a line. Must survive pickling.
    """
    return GroupWatch(cfg.group_sizes[-1] if cfg.run.elastic else None, say)


class GroupTrainer(TorchTrainer):
    """A TorchTrainer whose groups have allowed sizes, and whose failures are told.

    Args:
        *args: Of TorchTrainer.
        sizes: Allowed numbers of workers, ascending, if the number may change.
        say: Takes a line. Must survive pickling.
        **kwargs: Of TorchTrainer.
    """

    def __init__(
        self, *args: Any, sizes: tuple[int, ...], say: Callable[[str], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sizes, self._say = sizes, say

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        # Ray has no public way to choose a policy.
        config: Any = self.scaling_config
        elastic = config.elasticity_enabled
        policy = ElasticGroup(config, self._sizes) if elastic else FixedGroup(config)
        failures = Failures(self.run_config.failure_config, self._say)
        replaced = {**kwargs, "scaling_policy": policy, "failure_policy": failures}
        return super()._initialize_and_run_controller(**replaced)  # type: ignore[misc]
