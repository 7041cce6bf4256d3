"""Which tokens the samples of a batch have, where these differ from the encoder's whole grid.

Samples have grids of their own under the fit `whole`, and lack tokens if regions are left out.

Shape suffixes: B samples, N tokens of one time step of the largest grid, K' most tokens that a
sample of the batch keeps, 4 = (left, top, right, bottom), 2 = (height, width) or (rows, columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.keyed_random.arrays import I64, U64, key_of, mix
from models.media.fit import grids_of
from models.media.regions import Bools, kept_patches
from pipelines.config.data import DataConfig
from pipelines.config.train import ModelConfig
from pipelines.loading.masks.crops import I32, fitted_crops

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


def calibration_layout(model: ModelConfig, data: DataConfig) -> tuple[U64, Layout]:
    """Draws crops of pictures of several aspects, by which the lengths of masks are chosen.

    Returns:
        `CALIBRATION_DRAWS` keys, and the layout of their crops.
    """
    keys_B = mix(np.arange(CALIBRATION_DRAWS, dtype=np.uint64) ^ key_of(0))
    sizes_B2 = np.array(CALIBRATION_SIZES, np.int32)
    sizes_B2 = np.tile(sizes_B2, (-(-len(keys_B) // len(sizes_B2)), 1))[: len(keys_B)]
    boxes_B4 = fitted_crops(keys_B, sizes_B2, model, data)
    flipped_B = np.arange(len(keys_B)) % 2 == 1 if data.flip else np.zeros(len(keys_B), np.bool_)
    layout = make_layout(model, sizes_B2, boxes_B4, flipped_B)
    assert layout is not None
    return keys_B, layout
