"""Measures how fast the workers of one host exchange gradients, with gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
import time

import torch
import torch.distributed as dist

from pipelines.capacity.constants import Constant, measured_rate
from pipelines.worker_group.interface import use_interface_of

EXCHANGED_BYTES, ROUNDS = 2**25, 8


def measure_exchange(workers: int) -> Constant:
    """Measures bytes/s of a ring: what a process sends in an all-reduce, by its seconds.

    Args:
        workers: number of processes, which run on this machine; two or more.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_exchange, args=(rank, workers, folder, queue))
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
        seconds = queue.get()
        for process in processes:
            process.join()
    sent = 2 * EXCHANGED_BYTES * (1 - 1 / workers)
    return measured_rate(sent, seconds, f"measured here, gloo between {workers} processes")


def _exchange(rank: int, workers: int, folder: str, queue: object) -> None:
    torch.set_num_threads(1)
    use_interface_of()
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    values = torch.ones(EXCHANGED_BYTES // 4)
    seconds = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        queue.put(seconds[1:])  # type: ignore[attr-defined]
    dist.destroy_process_group()
