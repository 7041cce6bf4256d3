"""The loop that small networks beside a world model are trained by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    max_norm: float | None = None,
) -> Iterator[Tensor]:
    """Takes a step of AdamW whenever the next loss is asked for.

    Args:
        parameters: what is trained.
        loss: draws a batch and returns its loss.
        steps: optimizer steps, along which the learning rate falls by a half cosine.
        lr: peak learning rate.
        max_norm: gradients are clipped to this norm; None clips none.

    Yields:
        The loss of every step, detached, on its device.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        found = loss()
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        schedule.step()
        yield found.detach()
