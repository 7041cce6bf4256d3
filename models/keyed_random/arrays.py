"""Random numbers as a function of keys, as numpy arrays; `tensors` has the same for torch.

Randomness is a counter-based hash (splitmix64's finaliser over key + counter) and not a generator
with state: a sample's numbers do not depend on which batch, worker or process computes them, a
whole batch is one vectorised call, and no numpy version changes them. Imports no torch, so that
processes that only read start fast.

Shape suffixes: B keys, C draws a key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mix(x: U64) -> U64:
    """Hashes 64-bit words by splitmix64's finaliser (Steele, Lea, Flood 2014, figure 15)."""
    x = x + _GOLDEN
    x ^= x >> _S30
    x *= _MIX1
    x ^= x >> _S27
    x *= _MIX2
    x ^= x >> _S31
    return x


def key_of(*parts: int) -> np.uint64:
    """Makes one 64-bit key from integers (seed, epoch, stream, ...); their order matters."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(state[0])


def sample_keys(
    sample_ids: Sequence[bytes] | npt.NDArray[np.generic], seed: int, epoch: int
) -> U64:
    """Makes the keys that fix everything random about these samples in this epoch.

    Args:
        sample_ids: 16-byte ids: an array of itemsize 16 (`S16`, `V16`), uint8 [B, 16], or bytes.
        seed: the run's seed.
        epoch: the epoch.

    Returns:
        uint64 [B].

    Raises:
        ValueError: an id is not 16 bytes long.
    """
    raw = sample_ids.tobytes() if isinstance(sample_ids, np.ndarray) else b"".join(sample_ids)
    if len(raw) != 16 * len(sample_ids):
        raise ValueError(f"sample ids must be 16 bytes each, got {len(raw)} for {len(sample_ids)}")
    words_B2 = np.frombuffer(raw, "<u8").reshape(-1, 2).astype(np.uint64)
    return mix(mix(words_B2[:, 0] ^ key_of(seed, epoch)) ^ words_B2[:, 1])


def bits(keys_B: U64, stream: int, count: int) -> U64:
    """Returns `count` independent 64-bit words a key, uint64 [B, C]; each stream has its own."""
    stream_keys_B = mix(keys_B ^ key_of(stream))
    return mix(stream_keys_B[:, None] + np.arange(count, dtype=np.uint64) * _GOLDEN)


def uniforms(keys_B: U64, stream: int, count: int) -> F64:
    """Returns `count` independent uniforms in [0, 1) a key, float64 [B, C]."""
    words_BC = bits(keys_B, stream, count) >> np.uint64(11)
    return words_BC.astype(np.float64) * 2.0**-53


def permutation(key: np.uint64, count: int) -> I64:
    """Returns a random order of range(count), fixed by `key` on every numpy version."""
    # No two words are equal, because every step of `mix` can be undone. So all ways of sorting give
    # the same order.
    words = bits(np.array([key], np.uint64), 0, count)[0]
    return np.argsort(words).astype(np.int64, copy=False)
