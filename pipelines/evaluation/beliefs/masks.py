"""A few masks of a run's own kind that together hide every token, the same for all samples.

Shape suffixes: R masks, K context tokens, T hidden tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from models.beliefs.expectation import Mask
from models.keyed_random.arrays import sample_keys
from pipelines.config.train import PretrainConfig
from pipelines.loading.masks.maskers import MaskArrays, make_masker

DRAWN, MOST, OFTEN = 256, 24, 2
"""Masks that are chosen from, most that are chosen, and how often each token should be hidden."""


def choose_masks(cfg: PretrainConfig) -> list[Mask]:
    """Chooses masks as in training: always the one that hides most of what is seldom hidden yet.

    They are drawn from keys of their own, so they are the same for every seed of a run.
    """
    found = {_name(mask): mask for mask in _each(_draw(cfg))}
    left = list(found.values())
    chosen: list[Mask] = []
    times_N = torch.zeros(cfg.model.grid.tokens, dtype=torch.long)
    while left and len(chosen) < MOST:
        gains = [int((times_N[mask.hidden_T] < OFTEN).sum()) for mask in left]
        best = int(np.argmax(gains))
        if not gains[best]:
            break
        mask = left.pop(best)
        times_N[mask.hidden_T] += 1
        chosen.append(mask)
    return chosen


def future_masks(cfg: PretrainConfig) -> list[Mask]:
    """Masks of clips that hide one time step after the other, each behind all that came before.

    The first step, which has no past, is expected from the second.
    """
    grid = cfg.model.grid
    ids_SN = torch.arange(grid.tokens).reshape(grid.tubes, -1)
    pairs = [(ids_SN[1], ids_SN[0])]
    pairs += [(ids_SN[:step].flatten(), ids_SN[step]) for step in range(1, grid.tubes)]
    return [Mask(context_K=seen, hidden_T=hidden) for seen, hidden in pairs]


def _draw(cfg: PretrainConfig) -> MaskArrays:
    # The original's truncation never hides the last row and column, and needs a whole batch.
    cfg = dataclasses.replace(
        cfg,
        mask=dataclasses.replace(cfg.mask, truncate="random"),
        video_mask=dataclasses.replace(cfg.video_mask, truncate="random"),
    )
    keys = sample_keys([b"%016d" % number for number in range(DRAWN)], 0, 0)
    return make_masker(cfg).for_samples(keys)


def _each(drawn: MaskArrays) -> Iterator[Mask]:
    """Yields every pair of a context and a block or region that is to be expected from it."""
    for name, contexts in drawn.items():
        if not name.startswith("context_ids"):
            continue
        suffix = name.removeprefix("context_ids")
        targets = drawn[f"target_ids{suffix}"]
        for context, target in zip(contexts, targets, strict=True):
            blocks_MT = np.atleast_2d(target)
            # Blocks share their context, or each has its own (DMJD).
            contexts_MK = np.broadcast_to(context, (len(blocks_MT), context.shape[-1]))
            for seen_K, hidden_T in zip(contexts_MK, blocks_MT, strict=True):
                yield Mask(
                    context_K=torch.tensor(seen_K, dtype=torch.long),
                    hidden_T=torch.tensor(hidden_T, dtype=torch.long),
                    generator=int(suffix[1:] or 0),
                )


def _name(mask: Mask) -> tuple[object, ...]:
    return (mask.generator, *mask.context_K.tolist(), -1, *mask.hidden_T.tolist())
