"""Tensors whose rows are divided among processes, as `torch.distributed.fsdp.fully_shard` makes
them: DTensors with the placement Shard(0), or (Replicate(), Shard(0)) on a mesh of two dimensions.

Row means an index of the first dimension. As `torch.chunk` does it, process r of W holds the rows
from r * ceil(n / W) on, so the last processes may hold fewer, or none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Returns this process's rows of a sharded tensor, which share its memory; others unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns all rows of a sharded tensor, on every process that calls this; others unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: DTensor) -> slice:
    """Returns which rows this process holds."""
    mesh = tensor.device_mesh
    each = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    first = min(each * mesh.get_local_rank(mesh.ndim - 1), tensor.shape[0])
    return slice(first, min(first + each, tensor.shape[0]))


def is_first_replica(tensor: DTensor) -> bool:
    """Whether this process is among those that hold the first of several copies of the shards."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return not any(coordinate[:-1])


def sharded_like(rows: Tensor, like: DTensor) -> DTensor:
    """Makes a tensor divided as another one is.

    Args:
        rows: the rows of this process, `rows_of(like)`; the dtype stays.
        like: gives shape, device and processes.
    """
    return DTensor.from_local(
        rows.to(like.to_local().device).contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor divided as `like` is, or unchanged if `like` is not divided."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return sharded_like(tensor[rows_of(like)], like)


def shard_group(tensors: Iterable[Tensor]) -> dist.ProcessGroup | None:
    """Returns the processes that hold the shards of one copy; None if no tensor is sharded."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)
    return None


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Returns the norm of all gradients together, a scalar; that of the whole ones if sharded."""
    norm: Tensor = nn.utils.get_total_norm([local(gradient) for gradient in gradients])
    group = shard_group(gradients)
    if group is None:
        return norm
    squared = norm.square()
    dist.all_reduce(squared, group=group)
    return squared.sqrt()
