"""Messages for what happens to Ray: a process, a machine or the head is lost, or something is full.

Each has at most three lines: what happened, what Ray says of it, and what to do.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import textwrap

from pipelines.runtime.faults import Fault

AGAIN = "Submit the same command again to go on."
MOST_CHARACTERS = 240
"""Length at which what Ray says is cut off."""
_IP = re.compile(r"^\tip: (\S+)", re.M)
_PEERS = re.compile(
    r"gloo|NCCL|c10d|TCPStore|[Cc]onnection (closed|reset) by|Broken pipe|process group", re.I
)
"""What torch says when a process that it exchanges tensors with is gone."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One kind of fault."""

    names: tuple[str, ...]
    """Classes of Ray; those derived from them count as well."""
    what: str
    way_out: str = AGAIN
    reason: bool = True
    """Whether what Ray says helps."""


_KINDS = (
    _Kind(
        ("AuthenticationError",),
        "the Ray cluster refuses the token of this process, or got none",
        "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token as the cluster has it.",
        reason=False,
    ),
    _Kind(
        ("OutOfDiskError",),
        "no space left on a machine's disk for the objects of Ray",
        "Free the disk of Ray's temporary folder there, or name another one to `ray start` by "
        "--object-spilling-directory.",
        reason=False,
    ),
    _Kind(
        ("ObjectStoreFullError",),
        "the object store of a machine is full",
        "Give `ray start` a larger --object-store-memory, or the job fewer workers.",
        reason=False,
    ),
    _Kind(
        ("InsufficientClusterResourcesError",),
        "the cluster cannot become large enough for the workers",
        "Lower --run.workers or --run.cpus-per-worker, or allow more nodes.",
    ),
    _Kind(("WorkerGroupStartupTimeoutError",), "the workers did not start in time"),
    _Kind(("WorkerGroupStartupFailedError",), "the workers could not be started"),
    _Kind(
        ("CheckpointManagerInitializationError",),
        "Ray Train's list of the run's checkpoints is damaged, or names one that is gone",
        "Submit the same command again: it mends the list and goes on from the newest whole one.",
    ),
    _Kind(
        ("RuntimeEnvSetupError",),
        "a machine could not prepare the environment of the job",
        "Is its disk full, or the working directory too large?",
    ),
    _Kind(
        ("TaskUnschedulableError", "ActorUnschedulableError"),
        "a machine is gone that a part of the job was bound to",
    ),
    _Kind(("PreemptionError",), "machines of the job were taken away"),
    _Kind(("NodeDiedError", "LocalRayletDiedError"), "a machine was lost, or Ray on it"),
    _Kind(
        (
            *("ObjectLostError", "ObjectFetchTimedOutError", "OwnerDiedError"),
            *("ObjectFreedError", "ObjectReconstructionFailedError"),
        ),
        "data of the job was lost with a process or a machine",
    ),
    _Kind(("TaskCancelledError",), "the job was stopped"),
    _Kind(
        ("WorkerHealthCheckTimeoutError", "CollectiveTimeoutError"),
        "workers did not answer for a long time",
    ),
    _Kind(("GetTimeoutError", "RayChannelTimeoutError"), "Ray did not answer in time"),
    _Kind(
        (
            *("RayActorError", "WorkerCrashedError"),
            *("TaskPlacementGroupRemoved", "ActorPlacementGroupRemoved"),
        ),
        "a process of the job was lost",
    ),
    _Kind(("RpcError",), "the head of the Ray cluster does not answer"),
)
_ANY = _Kind((), "Ray failed")


def explain_ray(fault: Fault) -> str | None:
    """Returns the message for an error of Ray; None for another one."""
    if fault.text.startswith("Version mismatch:"):
        return _of_versions(fault)
    if fault.module != "ray":
        return None
    kind = next((kind for kind in _KINDS if fault.is_a(*kind.names)), _ANY)
    return _told(fault, kind.what, kind.way_out, reason=kind.reason)


def explain_peers(faults: list[Fault]) -> str | None:
    """Returns the message for errors of processes that trained with one that is gone.

    Args:
        faults: All errors of the job. If one of them is of another kind, this returns None.
    """
    if not faults or not all(map(_is_of_peers, faults)):
        return None
    return _told(faults[0], "workers lost touch with one another, because one of them is gone")


def _told(fault: Fault, what: str, way_out: str = AGAIN, *, reason: bool = True) -> str:
    where = _IP.search(fault.text)
    lines = [what + (f" on {where[1]}" if where else "")]
    if reason:
        lines.append(f"({reason_of(fault)})")
    return "\n".join([*lines, way_out + logs_are()])


def reason_of(fault: Fault) -> str:
    """Returns the class of an error and what it says, in one line that is cut off if it is long."""
    # Lines that begin with a tab identify the process; the others say why it is gone.
    lines = [line for line in fault.text.splitlines() if not line.startswith("\t")]
    text = " ".join(lines).removeprefix("The actor died unexpectedly before finishing this task.")
    text = text.partition("There are some potential root causes.")[0].strip()
    return textwrap.shorten(": ".join(part for part in (fault.name, text) if part), MOST_CHARACTERS)


def _is_of_peers(fault: Fault) -> bool:
    kinds = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
    return fault.is_a(*kinds) and fault.module in ("builtins", "torch") and _spoken(fault)


def _spoken(fault: Fault) -> bool:
    return fault.name.startswith("Dist") or _PEERS.search(fault.text) is not None


def _of_versions(fault: Fault) -> str:
    """Ray's five lines in one."""
    found = re.findall(r"(Ray|Python): (\S+)", fault.text)
    told = [", ".join(f"{name} {version}" for name, version in found[i : i + 2]) for i in (0, 2)]
    return (
        f"the Ray cluster runs {told[0]}, and this machine {told[1]}\n"
        "Install the same here: all machines of a cluster need one version of both."
    )


def logs_are() -> str:
    """Says where Ray's logs are on each machine, if this process is joined to a cluster."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    node = ray._private.worker.global_worker.node
    return f" Ray's logs are in {node.get_logs_dir_path()}, on each machine." if node else ""
