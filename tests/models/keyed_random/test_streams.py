"""No two streams share a number under one key, and the loader uses registered numbers only."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from models.image_size import Grid
from models.keyed_random import arrays, streams, tensors
from models.keyed_random.streams import SampleStream, Stream
from pipelines.config.data import ClipConfig, MaskConfig, VideoMaskConfig
from pipelines.loading.clips import ClipSampler
from pipelines.loading.masks.crops import random_crops
from pipelines.loading.masks.maskers import (
    ClipMasker,
    DisjointMasker,
    MultiblockMasker,
    RandomMasker,
)
from pipelines.loading.masks.multiblock import ATTEMPTS

KEY_SPACES = [space for space in vars(streams).values() if isinstance(space, type)]
KEY_SPACES = [space for space in KEY_SPACES if issubclass(space, Stream) and space is not Stream]


def overlapping(space: type[Stream]) -> list[tuple[str, str]]:
    pairs = combinations(space.__members__.items(), 2)
    return [(a, b) for (a, one), (b, other) in pairs if set(one.numbers) & set(other.numbers)]


@pytest.mark.parametrize("space", KEY_SPACES)
def test_no_two_streams_of_a_key_share_a_number(space: type[Stream]) -> None:
    assert len(space) > 0
    assert overlapping(space) == []


def test_overlapping_streams_are_detected() -> None:
    class Bad(Stream):
        FIRST = 5, 3
        SECOND = 7
        THIRD = 7  # an alias to Python, which iterating over the class would skip

    assert overlapping(Bad) == [("FIRST", "SECOND"), ("FIRST", "THIRD"), ("SECOND", "THIRD")]


def test_a_stream_refuses_numbers_beyond_its_own() -> None:
    assert SampleStream.VIEWS.at(99) == 400
    with pytest.raises(IndexError):
        SampleStream.VIEWS.at(100)


def test_block_masks_have_numbers_for_every_attempt() -> None:
    assert SampleStream.MASK.count == 3 * (ATTEMPTS + 1)
    assert streams.ClipMaskStream.ATTEMPTS.count == 2 * (ATTEMPTS + 1)


def test_every_draw_of_the_loader_has_a_registered_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, crops and clips ask for streams that the registry names, and for no other number."""
    keys = arrays.sample_keys([i.to_bytes(16, "little") for i in range(64)], 0, 0)
    asked: set[int] = set()
    key_of = arrays.key_of

    def recorded(*parts: int) -> np.uint64:
        if len(parts) == 1:  # a stream; keys have several parts
            asked.add(int(parts[0]))
        return key_of(*parts)

    monkeypatch.setattr(arrays, "key_of", recorded)
    # This one draws again and again.
    MultiblockMasker(Grid(8, 8), MaskConfig(context_keep=30)).for_samples(keys)
    ClipMasker(Grid(8, 8, 4), VideoMaskConfig()).for_samples(keys)
    MultiblockMasker(Grid(8, 8), MaskConfig(truncate="legacy")).for_batch(key_of(0, 1), 64)
    ClipMasker(Grid(8, 8, 4), VideoMaskConfig(truncate="legacy")).for_batch(key_of(0, 1), 64)
    RandomMasker(64, 16).for_samples(keys)
    DisjointMasker(64, 4, None).for_samples(keys)
    random_crops(keys, np.full((64, 2), 40, np.int32), (0.3, 1.0), (0.75, 1.3))
    ClipSampler(frames=4, settings=ClipConfig()).random(np.full(64, 30), np.full(64, 25.0), keys)
    registered = {n for space in KEY_SPACES for stream in space for n in stream.numbers[:1000]}
    assert {1, 3, 16, 17, 18, 19, 256, 257, 401} <= asked <= registered


def test_numpy_and_torch_compute_the_same_hash() -> None:
    """Tensors and arrays have the same hash, bit for bit."""
    import torch

    keys = arrays.sample_keys([bytes([i] * 16) for i in range(32)], 1, 2)
    words = tensors.bits(torch.from_numpy(keys.view(np.int64)), SampleStream.VIEWS, 5)
    assert (words.numpy().view(np.uint64) == arrays.bits(keys, SampleStream.VIEWS, 5)).all()
