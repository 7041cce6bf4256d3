"""Masks of single patches, as functions of the samples' keys; numpy only.

Shape suffixes: B samples, N tokens of an image, C contexts an image, K context tokens, T target
tokens of a context.
"""

from __future__ import annotations

import numpy as np

from models.keyed_random.arrays import U64, bits
from models.keyed_random.streams import SampleStream
from pipelines.loading.masks.multiblock import I32


def random_masks(keys_B: U64, count: int, keep: int) -> tuple[I32, I32]:
    """Hides all but `keep` random tokens, as in MAE (He et al. 2022, arXiv 2111.06377, section 3).

    Args:
        keys_B: `keyed_random.arrays.sample_keys`.
        count: N.
        keep: K.

    Returns:
        The visible tokens [B, K] and the hidden ones [B, N - K], int32, ascending.
    """
    order_BN = _orders(keys_B, count)
    return np.sort(order_BN[:, :keep], axis=1), np.sort(order_BN[:, keep:], axis=1)


def disjoint_masks(
    keys_B: U64, count: int, contexts: int, keep: int | None = None
) -> tuple[I32, I32]:
    """Divides the tokens among C contexts as their targets; a context sees tokens of the others.

    These are the masks of DMJD (Ma et al. 2023, arXiv 2301.00230, section 3.2).

    Args:
        keys_B: `keyed_random.arrays.sample_keys`.
        count: N; the N mod C tokens left over are targets of no context.
        contexts: C.
        keep: K; None keeps all N - T.

    Returns:
        Context tokens [B, C, K] and target tokens [B, C, T], T = N // C, int32, ascending.
    """
    targets = count // contexts
    keep = count - targets if keep is None else keep
    order_BN = _orders(keys_B, count)
    first_C1 = targets * np.arange(contexts)[:, None]
    target_BCT = order_BN[:, first_C1 + np.arange(targets)]
    # A context sees the tokens after its targets in the random order, which wraps around.
    context_BCK = order_BN[:, (first_C1 + targets + np.arange(keep)) % count]
    return np.sort(context_BCK, axis=2), np.sort(target_BCT, axis=2)


def _orders(keys_B: U64, count: int) -> I32:
    """Draws a random order of the tokens for every sample, int32 [B, N]."""
    return np.argsort(bits(keys_B, SampleStream.PATCHES, count), axis=1).astype(np.int32)
