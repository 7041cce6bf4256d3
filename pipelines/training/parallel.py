"""How the workers of a run share its model (`--run.parallel`), and what they exchange at a step.

ddp: every worker holds all of it. fsdp: each holds some rows of every weight, of its gradient and
of its optimizer state, and gathers one transformer block at a time. hsdp: fsdp within a host, ddp
between hosts. Zhao et al. 2023, arXiv 2304.11277; in torch: `fully_shard`.

Objectives call methods of their encoders and read weights directly, where `fully_shard` has no
hooks. This is why only blocks are units of their own, which are always called as modules. All else
(patch embedding, positions, norms, mask tokens, projector) belongs to the objective itself and is
whole from the beginning of its forward pass to the end of its backward pass.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from models.encoders.timm_parts import Block
from models.encoders.vit import VisionTransformer
from models.objectives.objective import Objective
from models.shards import whole
from pipelines.config.train import PretrainConfig
from pipelines.training.contract import Say, Worker
from pipelines.worker_group.interface import use_interface_of


@contextlib.contextmanager
def processes(cfg: PretrainConfig) -> Iterator[None]:
    """A context in which there is a process group for sharding, if only of this one process."""
    alone = cfg.run.parallel != "ddp" and not dist.is_initialized()
    if alone:
        backend = "cpu:gloo,cuda:nccl" if cfg.run.gpu else "gloo"
        use_interface_of()
        store = dist.HashStore()  # type: ignore[attr-defined]  # as its documentation names it
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        if alone:
            dist.destroy_process_group()


def shard_mesh(cfg: PretrainConfig, worker: Worker, say: Say = print) -> DeviceMesh | None:
    """Arranges the workers for sharding: (replicas, shards) or (shards,); None under ddp.

    A group whose hosts have different numbers of workers forms no rectangle, as hsdp needs. It may
    become one again, if a host was lost; until then it is sharded over all of its workers.
    """
    if cfg.run.parallel == "ddp":
        return None
    kind, count = worker.device.type, worker.world_size
    if cfg.run.parallel == "hsdp":
        hosts = [
            (host, len(list(ranks))) for host, ranks in itertools.groupby(worker.all(worker.host))
        ]
        sizes = {size for _, size in hosts}
        if len(sizes) == 1 and len(dict(hosts)) == len(hosts):
            shape = (len(hosts), hosts[0][1])
            return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        told = ", ".join(f"{host} {size}" for host, size in hosts)
        say(
            f"WARNING: --run.parallel hsdp: hosts have different numbers of workers ({told}), so "
            "the model is sharded over all of them, as by fsdp"
        )
    return init_device_mesh(kind, (count,), mesh_dim_names=("shard",))


def shard(objective: Objective, cfg: PretrainConfig, mesh: DeviceMesh) -> None:
    """Divides the weights of an objective among the workers, in place.

    Every worker must hold the same weights before. An optimizer must be made afterwards, because
    parameters become others.
    """
    # Views of a batch are returned to be watched, and nobody changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    offload = CPUOffloadPolicy() if cfg.run.cpu_offload else OffloadPolicy()
    for block in [part for part in objective.modules() if isinstance(part, Block)]:
        if cfg.run.compile:
            # The forward function alone, so that the hooks, which communicate, stay outside.
            block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
        policy = _precision(cfg, mesh.device_type)
        unit = fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
        if not any(parameter.requires_grad for parameter in block.parameters()):
            unit.set_unshard_in_backward(False)  # target encoders have no backward pass
    fully_shard(objective, mesh=mesh, offload_policy=offload)


def _precision(cfg: PretrainConfig, device_type: str) -> MixedPrecisionPolicy:
    """Gathers weights in the type in which autocast uses them; reduces gradients in fp32.

    On a CPU autocast casts them after they are gathered, because LayerNorm's kernel there takes no
    bf16 weights for fp32 tokens.
    """
    if cfg.run.precision == "fp32" or device_type == "cpu":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def wrap(objective: Objective, cfg: PretrainConfig, worker: Worker) -> nn.Module:
    """Returns the module to call in training: the objective, under ddp wrapped to exchange
    gradients."""
    if isinstance(objective, FSDPModule):
        return objective
    if cfg.run.compile:
        # Compiled in place, so that the names in checkpoints do not change.
        objective.compile(dynamic=False)
    if worker.world_size == 1:
        return objective
    return nn.parallel.DistributedDataParallel(
        objective,
        device_ids=[worker.device] if worker.device.type == "cuda" else None,
        # Buffers are constants of the configuration (mean, std) or count steps, so every process
        # has the same ones already.
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def exchanging(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """A context for one micro-batch: gradients cross the network in the last one of a step.

    Shards are reduced after every micro-batch, because whole gradients would take the memory that
    sharding saves; the sum over hosts of hsdp is left to the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def whole_encoder(encoder: nn.Module, worker: Worker) -> nn.Module | None:
    """Returns an encoder that rank 0 can run by itself; every process must call this.

    It is the encoder itself or, if that is sharded, a copy; None on other ranks then.
    """
    if not any(isinstance(part, FSDPModule) for part in encoder.modules()):
        return encoder
    assert isinstance(encoder, VisionTransformer)
    weights = {}
    for name, tensor in encoder.state_dict().items():
        gathered = whole(tensor)
        if worker.rank == 0:
            weights[name] = gathered
    if worker.rank != 0:
        return None
    with torch.random.fork_rng(devices=[]), worker.device:
        copy = VisionTransformer(encoder.shape)
    copy.load_state_dict(weights)
    return copy.eval().requires_grad_(False)
