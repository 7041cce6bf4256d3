"""Which tokens the samples of a batch have, where these differ from the encoder's whole grid.

Samples have grids of their own under the fit `whole`, and lack tokens if regions are left out.

Shape suffixes: B samples, N tokens of one time step of the largest grid, K' most tokens that a
sample of the batch keeps, 4 = (left, top, right, bottom), 2 = (height, width) or (rows, columns).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from models.image_size import Grid
from models.keyed_random.arrays import I64, U64, key_of, mix
from models.media.fit import grids_of
from models.media.regions import Bools, kept_patches
from pipelines.config.data import DataConfig
from pipelines.config.train import ModelConfig
from pipelines.loading.masks.crops import I32, fitted_crops

LEAST_SHARE = 1 / 3
"""A crop that keeps a smaller share of its tokens is replaced by all that the input shows."""
LEAST_TOKENS = 2
"""Patches that a sample must keep: one for the context and one to predict."""
CALIBRATION_DRAWS = 2048
CALIBRATION_SIZES = ((720, 1280), (1280, 720), (960, 1280), (1280, 960), (1024, 1024), (640, 1280))
"""Heights and widths of the pictures by whose crops the lengths of masks are chosen."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of some samples. Time steps are all alike."""

    grids_B2: I64
    """Rows and columns of each sample's grid."""
    kept_BN: Bools
    """Which patches of one time step exist and are not left out, in raster order of each sample's
    own grid."""

    def __getitem__(self, rows: I64 | Bools) -> Layout:
        """Returns the layout of some of the samples."""
        return Layout(self.grids_B2[rows], self.kept_BN[rows])

    @property
    def counts_B(self) -> I64:
        """Number of patches of one time step that each sample keeps."""
        counts_B: I64 = self.kept_BN.sum(1)
        return counts_B

    def by_grid(self, tubes: int = 1) -> Iterator[tuple[Grid, I64, Bools]]:
        """Yields every grid that occurs, the numbers of its samples, and the patches these keep.

        Args:
            tubes: time steps of the grids.
        """
        grids_G2, which_B = np.unique(self.grids_B2, axis=0, return_inverse=True)
        for g, (rows, columns) in enumerate(grids_G2.tolist()):
            samples = np.flatnonzero(which_B.reshape(-1) == g)
            yield Grid(rows, columns, tubes), samples, self.kept_BN[samples, : rows * columns]

    def kept_ids(self, tubes: int) -> list[I32]:
        """Returns the numbers of the tokens that each sample keeps, ascending.

        Every time step takes N numbers, also where a sample has fewer tokens, because a sample's
        strip has N patches (`pipelines.loading.decoding`).

        Args:
            tubes: time steps of the token grid.
        """
        starts = np.arange(tubes)[:, None] * self.kept_BN.shape[1]
        return [
            (starts + np.flatnonzero(kept_N)).reshape(-1).astype(np.int32)
            for kept_N in self.kept_BN
        ]


def make_layout(
    model: ModelConfig, sizes_B2: I32, boxes_B4: I32, flipped_B: Bools
) -> Layout | None:
    """Makes the layout of some crops; None if every sample has the encoder's whole grid.

    Args:
        model: the input, its fit, and the regions that are left out.
        sizes_B2: heights and widths of the pictures, pixels.
        boxes_B4: the crop of each, pixels.
        flipped_B: whether the crop is flipped left to right.
    """
    if not model.partial:
        return None
    grids_B2 = grids_of(model.chosen_fit, boxes_B4, model.image_size, model.patch_size)
    most = model.grid.per_step
    kept_BN = kept_patches(model.exclude, sizes_B2, boxes_B4, grids_B2, most, flipped_B)
    return Layout(grids_B2, kept_BN)


def draw_crops(
    keys_B: U64, sizes_B2: I32, flipped_B: Bools, model: ModelConfig, data: DataConfig
) -> tuple[I32, Layout | None]:
    """Draws a crop of every picture, and makes the layout of its tokens.

    A crop of which less than `LEAST_SHARE` is left, because most of it lies in regions that are
    left out, is replaced by all that the input shows of the picture.

    Args:
        keys_B: `sample_keys`.
        sizes_B2: heights and widths of the pictures, pixels.
        flipped_B: whether the crop is flipped left to right.
        model: the input, its fit, and the regions that are left out.
        data: range of the crops' areas and ratios.

    Returns:
        The boxes, see `fitted_crops`; and the layout, None if every sample has the encoder's whole
        grid.

    Raises:
        ValueError: a picture has less than `LEAST_TOKENS` even then.
    """
    boxes_B4 = fitted_crops(keys_B, sizes_B2, model, data)
    layout = make_layout(model, sizes_B2, boxes_B4, flipped_B)
    if layout is None or not model.exclude:
        return boxes_B4, layout
    poor = np.flatnonzero(layout.counts_B < LEAST_SHARE * layout.grids_B2.prod(1))
    if not len(poor):
        return boxes_B4, layout
    largest = dataclasses.replace(data, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    boxes_B4[poor] = fitted_crops(keys_B[poor], sizes_B2[poor], model, largest)
    layout = make_layout(model, sizes_B2, boxes_B4, flipped_B)
    assert layout is not None
    for height, width in sizes_B2[layout.counts_B < LEAST_TOKENS].tolist():
        raise ValueError(
            f"--model.exclude: of a picture of {width}x{height} pixels, the regions leave fewer "
            f"than {LEAST_TOKENS} tokens; leave out less, or choose another --model.fit"
        )
    return boxes_B4, layout


@dataclass(frozen=True)
class CropSettings:
    """The settings that crops and layouts follow; lengths of masks are chosen by them."""

    model: ModelConfig
    data: DataConfig


@functools.lru_cache(maxsize=8)
def calibration_layout(crops: CropSettings) -> tuple[U64, Layout]:
    """Draws crops of pictures of several aspects, by which the lengths of masks are chosen.

    Args:
        crops: the run's settings.

    Returns:
        `CALIBRATION_DRAWS` keys, and the layout of their crops.

    Raises:
        ValueError: the regions leave too little of a picture.
    """
    keys_B = mix(np.arange(CALIBRATION_DRAWS, dtype=np.uint64) ^ key_of(0))
    sizes_B2 = np.array(CALIBRATION_SIZES, np.int32)
    sizes_B2 = np.tile(sizes_B2, (-(-len(keys_B) // len(sizes_B2)), 1))[: len(keys_B)]
    flipped_B = np.arange(len(keys_B)) % 2 == 1 if crops.data.flip else np.zeros(len(keys_B), bool)
    _, layout = draw_crops(keys_B, sizes_B2, flipped_B, crops.model, crops.data)
    assert layout is not None
    return keys_B, layout
