"""Ray Train's scaling policies with our sizes: which group starts, and when it is asked to grow.

Ray's elastic policy resizes a running group at once, and the steps since the last checkpoint are
lost. Here the group is asked to stop after a checkpoint instead; then the next one starts, as after
a failure, with as many workers as fit by then.
"""

from __future__ import annotations

import os
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroupPollStatus,
    WorkerGroupState,
)

from pipelines.worker_group.cluster_use import read_leaving, read_use
from pipelines.worker_group.group import selector, this_group
from pipelines.worker_group.sizes import largest_size
from pipelines.worker_group.stopping import ask_to_stop

GROW_ENV = "RAYJEPA_GROW_EVERY_S"
"""Seconds between looks for room for more workers; tests shorten them."""
GROW_S = 60.0
WAIT_S = 1.0
"""Pause between two looks while no group can start; Ray itself would not pause."""


def grow_every_s() -> float:
    """Returns the seconds between two looks for room for more workers."""
    return float(os.environ.get(GROW_ENV, GROW_S))


def places() -> dict[str, str] | None:
    """Returns Ray's selector of nodes for a group that starts now; None for any node."""
    return selector(this_group().avoided() | read_leaving())


class FixedGroup(FixedScalingPolicy):
    """A group of one size; avoids hosts that failed by themselves or are about to go."""

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """Returns where the workers may be placed; None for anywhere."""
        return places()


class ElasticGroup(ElasticScalingPolicy):
    """A group of one of several sizes: the largest for which there is room.

    What counts is what nodes have and others do not hold.

    Args:
        scaling_config: Ray's, with the range of workers.
        sizes: Allowed sizes, ascending.
    """

    def __init__(self, scaling_config: Any, sizes: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes
        self._asked: str | None = None

    def _get_reserved_resources(self) -> Any:
        return {}  # not None, which would be no answer; see `_count_possible_workers`

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # Not by what Ray's coordinator has reserved for this job: it keeps what a job that was
        # stopped has asked for, for three minutes, and nodes that are gone, for 20 seconds.
        group = this_group()
        need = self.scaling_config._resources_per_worker_not_none
        use = read_use(group.placement)
        return largest_size(
            group.worth_trying(self._sizes),
            use.fitting(need, group.avoided()),
            use.cpus - use.held_cpus,
            need.get("CPU", 0.0),
        )

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """Returns where the workers may be placed; None for anywhere."""
        return places()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Starts as many workers as fit, or waits."""
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(WAIT_S)
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Asks a group to stop after a checkpoint if a larger one fits; never ends it itself."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        group = worker_group_state.placement_group_handle.placement_group.id.hex()
        now = worker_group_state.num_workers
        if (
            isinstance(decision, ResizeDecision)
            and decision.num_workers > now
            and self._asked != group
        ):
            self._asked = group
            reason = f"there is room for {decision.num_workers} workers instead of {now}"
            asked: Any = [w.execute_async(ask_to_stop, reason) for w in worker_group_state.workers]
            ray.get(asked)
        return NoopDecision()
