"""Connects a command to Ray, or starts Ray, so that workers find our packages from any folder."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from pathlib import Path
from typing import Any

from pipelines.config.train import PretrainConfig
from pipelines.runtime.lines.quiet import quiet_ray
from pipelines.runtime.signals import ending_in_order

ROOT = Path(__file__).resolve().parent.parent.parent
DATA_CPUS = 0.5
"""CPUs that must be left for Ray Data's tasks; without them the loader would wait for ever."""
JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"
ANSWER_S = 10.0
LOG_ENV = "RAY_LOG_TO_DRIVER"
"""Ray's own: 1 shows what workers print and log."""


def start_ray(cpus: float = 0.0, *, training: bool = False) -> None:
    """Makes sure that this process has a Ray whose workers find our packages.

    In this order: the one it has already; the one that RAY_ADDRESS names; the one that `ray start`
    left on this machine; one of its own (as with RAY_ADDRESS=local) with room for `cpus`.

    Args:
        cpus: What the job reserves; CPUs are only a count, so that a machine with fewer cores still
            gets room.
        training: Losses of processes are told by Ray Train's failure policy.

    Raises:
        ValueError: RAY_ADDRESS is not the address of a Ray.
        ConnectionError: no Ray there.
    """
    import ray

    if ray.is_initialized():
        return
    settings: dict[str, Any] = {
        "runtime_env": runtime_env(),
        "include_dashboard": False,  # ten processes more, of which no command asks anything
        "logging_level": logging.WARNING,
        # What a worker raises is raised here too, once, and told in words; Ray would print it
        # before.
        "log_to_driver": None if LOG_ENV in os.environ else False,
    }
    quiet_ray(training=training)
    own: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, math.ceil(cpus))}
    address = os.environ.get("RAY_ADDRESS") or None
    with ending_in_order():
        if address == "local":
            ray.init(address, **settings, **own)
        elif address is not None:
            _join(address, settings)
        else:
            _join_or_start(settings, own)


def configure_data(context: Any) -> None:
    """Sets what every Ray dataset of ours needs in its `ray.data.DataContext`.

    Ray 2.60 ends an execution that for half an hour neither gave nor took a block. Ours may well:
    a trainer can take longer over one (its steps are slow, or a set has a small share of them), and
    so can a cluster that waits for machines. A line a minute says what a job waits for.
    """
    context.enable_progress_bars = False  # ours count images and bytes
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1


def _join(address: str, settings: dict[str, Any]) -> None:
    import ray
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,  # `ray.init` does it only without an address
    )

    if "://" in address:
        raise ValueError(
            f"RAY_ADDRESS: {address} is not the address of a node; give HOST:PORT as `ray start` "
            "prints it (6379 is its usual port), or use `ray job submit`"
        )
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        if address != "auto":
            _require_ray(address)
        ray.init(address, **settings)
    except OSError as error:
        raise ConnectionError(
            f"RAY_ADDRESS: no Ray answers at {address}; unset it to start one on this machine"
        ) from error


def _require_ray(address: str) -> None:
    """Asks a head whether it is there: Ray would ask for long, and print a line for every try.

    Raises:
        OSError: Nobody listens there, or it is no Ray.
        ray.exceptions.AuthenticationError: It refuses the token of this process, or its lack.
        ValueError: Not HOST:PORT.
    """
    import grpc  # type: ignore[import-untyped]
    from ray._private.grpc_utils import init_grpc_channel  # brings the token along
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    _require_listener(address)
    messages: Any = gcs_service_pb2
    stubs: Any = gcs_service_pb2_grpc
    with init_grpc_channel(address) as channel:
        nodes = stubs.NodeInfoGcsServiceStub(channel)
        try:
            nodes.CheckAlive(messages.CheckAliveRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise AuthenticationError(f"{address} refuses the token") from error
            raise ConnectionError(f"no Ray at {address}: {error.code()}") from error


def _require_listener(address: str) -> None:
    """Raises OSError if nobody listens, and ValueError if it is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"RAY_ADDRESS: {address!r} is not HOST:PORT, `auto` or `local`")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S):
        pass


def _join_or_start(settings: dict[str, Any], own: dict[str, Any]) -> None:
    """Joins a Ray started here by `ray start`, which refuses `num_cpus`, or starts one."""
    import ray
    from ray._private.services import get_ray_address_from_environment

    try:
        ray.init(**settings, **own)
    except ValueError as error:
        if "existing cluster" not in str(error):
            raise
        try:
            _require_ray(get_ray_address_from_environment(None, None))  # type: ignore[arg-type]
            ray.init(**settings)
        except OSError:  # one that was killed: its address stays behind
            ray.init("local", **settings, **own)


def runtime_env() -> dict[str, Any] | None:
    """Returns the runtime environment with which workers find our packages.

    Workers run in other folders, and the packages may not be installed. The working directory of a
    Ray job already contains them, on every node; then this is None.
    """
    job = json.loads(os.environ.get(JOB_ENV, "{}")).get("runtime_env") or {}
    if {"working_dir", "py_modules"} & job.keys() or "PYTHONPATH" in job.get("env_vars", {}):
        return None  # Ray refuses to have the same set twice
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {"env_vars": {"PYTHONPATH": path}}


def cpus_needed(cfg: PretrainConfig) -> float:
    """Returns the CPUs that a run's workers and its data tasks reserve, at the least."""
    return cfg.group_sizes[0] * cfg.run.cpus_per_worker + DATA_CPUS


def check_fits(cfg: PretrainConfig, *, runs: int = 1) -> None:
    """Refuses a run whose workers and Ray Data tasks cannot both get CPUs (or GPUs).

    On an autoscaling cluster, the size that it may grow to counts.

    Args:
        cfg: The run.
        runs: How many runs train at the same time.

    Raises:
        ValueError: naming what there is, what is needed and the flags.
    """
    import ray
    from ray._private.state import state  # no public way to the autoscaler's limits in 2.60

    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    may_grow = state.get_max_resources_from_cluster_config() or {}
    cpus = max(there.get("CPU", 0.0), may_grow.get("CPU", 0.0))
    needed = runs * cpus_needed(cfg)
    many = f", --concurrent {runs} times," if runs > 1 else ""
    if cpus < needed:
        raise ValueError(
            f"the Ray cluster has {cpus:g} CPUs; {cfg.group_sizes[0]} workers at "
            f"--run.cpus-per-worker {cfg.run.cpus_per_worker:g} and {DATA_CPUS:g} for the data "
            f"tasks{many} need {needed:g}. Lower --run.cpus-per-worker or --run.workers, or add "
            "nodes."
        )
    gpus = max(there.get("GPU", 0.0), may_grow.get("GPU", 0.0))
    if cfg.run.gpu and gpus < runs * cfg.group_sizes[0]:
        raise ValueError(
            f"the Ray cluster has {gpus:g} GPUs; --run.workers {cfg.group_sizes[0]} with --run.gpu"
            f"{many} needs one each."
        )
