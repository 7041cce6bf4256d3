"""Random numbers as a function of keys, as tensors on the keys' device.

There is no generator and no state, and nothing waits for the device. A key is 64 bits held in an
int64. The hash is that of `arrays`, so a sample's numbers do not depend on which batch, process or
kind of device computes them.

Shape legend: B keys, C draws a key.
"""

from __future__ import annotations

import math

import torch

_WORD = 2**64 - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    """Returns the int64 that has the bits of a 64-bit word."""
    word &= _WORD
    return word - 2**64 if word >> 63 else word


def _mix_word(word: int) -> int:
    word = (word + _GOLDEN) & _WORD
    word = ((word ^ word >> 30) * _MIX1) & _WORD
    word = ((word ^ word >> 27) * _MIX2) & _WORD
    return word ^ word >> 31


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """Shifts right and fills with zeros (int64's own shift copies the sign)."""
    shifted: torch.Tensor = (words >> by) & (2 ** (64 - by) - 1)
    return shifted


def mix(words: torch.Tensor) -> torch.Tensor:
    """Hashes 64-bit words held in int64 by splitmix64's finaliser (Steele et al. 2014, figure 15).

    Products and sums of int64 wrap around, which gives the same bits as unsigned arithmetic.
    """
    words = words + _signed(_GOLDEN)
    words = (words ^ _shifted(words, 30)) * _signed(_MIX1)
    words = (words ^ _shifted(words, 27)) * _signed(_MIX2)
    return words ^ _shifted(words, 31)


def bits(keys_B: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """Returns `count` independent 64-bit words a key, int64 [B, C]; each stream has its own."""
    stream_keys_B = mix(keys_B ^ _signed(_mix_word(stream)))
    counters_C = torch.arange(count, device=keys_B.device) * _signed(_GOLDEN)
    return mix(stream_keys_B[:, None] + counters_C)


def uniforms(keys_B: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """Returns `count` independent uniforms in [0, 1) a key, float32 [B, C], multiples of 2**-24."""
    return _shifted(bits(keys_B, stream, count), 40).float() * 2.0**-24


def normals(keys_B: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """Returns `count` independent standard normals a key, float32 [B, C] (Box and Muller, 1958)."""
    pairs = -(-count // 2)
    draws_B2P = uniforms(keys_B, stream, 2 * pairs)
    radius_BP = (-2 * (1 - draws_B2P[:, :pairs]).log()).sqrt()  # 1 - u is never 0
    angle_BP = 2 * math.pi * draws_B2P[:, pairs:]
    both_B2P = torch.cat([radius_BP * angle_BP.cos(), radius_BP * angle_BP.sin()], dim=1)
    return both_B2P[:, :count]
