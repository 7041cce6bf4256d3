"""The registry of random streams: the numbers that keep draws under one key independent.

A draw is a function of a key, a stream number and a counter. Two draws under the same key must
have different stream numbers, or they would be the same numbers. Each class below is one key space
and names all streams of it; `tests/models/keyed_random/test_streams.py` checks that none overlap.
The numbers are part of the result of every run: never change one.

To add a stream, add a member with an unused number to the class of its key.
"""

from __future__ import annotations

from enum import IntEnum, unique

OPEN = 2**20
"""Count of a stream whose use of numbers depends on the configuration: the last of its class."""


class Stream(IntEnum):
    """One stream number, or the first of `count` consecutive ones. Members are written `first` or
    `first, count`."""

    count: int

    def __new__(cls, first: int, count: int = 1) -> Stream:
        """Makes a member."""
        stream = int.__new__(cls, first)
        stream._value_ = first
        stream.count = count
        return stream

    @property
    def numbers(self) -> range:
        """All numbers of the stream."""
        return range(self.value, self.value + self.count)

    def at(self, offset: int) -> int:
        """Returns number `offset` of the stream.

        Raises:
            IndexError: the stream has fewer numbers.
        """
        return self.numbers[offset]


@unique
class SampleStream(Stream):
    """Streams under the key of a sample in an epoch (`arrays.sample_keys`)."""

    CROP = 1
    """Training crop."""
    FLIP = 2
    """Horizontal flip."""
    CLIP = 3
    """First frame of the clip."""
    MASK = 16, 75
    """I-JEPA's block masks: 3 numbers for each of 25 attempts."""
    CLIP_MASK = 256
    """Makes the keys of `ClipMaskStream`, one for each mask generator."""
    VIEWS = 301, 100
    """Augmented views: 2 numbers for each of 50 views."""
    PATCHES = 401
    """Masks of single patches."""


@unique
class ClipMaskStream(Stream):
    """Streams under the key of a mask generator for one clip (`SampleStream.CLIP_MASK`)."""

    ATTEMPTS = 256, 50
    """Hidden tokens, then the kept subset, for each of 25 attempts."""


@unique
class LegacyClipMaskStream(Stream):
    """Streams under the key of a mask generator for one batch of legacy masks."""

    CLIPS = 256
    """Makes a `ClipMaskStream` key for each clip of the batch."""
    ASPECT = 257
    """Aspect ratio of the batch's blocks."""


@unique
class LegacyBatchStream(Stream):
    """Streams under the key of one batch of legacy image masks."""

    SIZES = 16
    """Block sizes of the batch."""
    SAMPLES = 17
    """Makes a `LegacyMaskStream` key for each image of the batch."""


@unique
class LegacyMaskStream(Stream):
    """Streams under the key of one image in a batch of legacy masks."""

    TARGETS = 18
    """Places of the target blocks."""
    CONTEXT = 19, OPEN
    """Place of the context block, one number an attempt."""


@unique
class PlanStream(Stream):
    """Second part of the keys made by `arrays.key_of(seed, stream, epoch, ...)`."""

    GROUPS = 101
    """Order of the row groups in an epoch."""
    ROWS = 102
    """Order of the rows in one window of a lane."""
    LEGACY_MASKS = 103
    """Key of one batch of legacy masks."""


@unique
class StepStream(Stream):
    """Streams under the key of an optimizer step."""

    SLICES = 201
    """Directions of SIGReg's projections."""
