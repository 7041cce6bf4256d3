"""Tokens a second of one encoder on a square grid, a rectangle, and grids of their own.

    python benchmarks/training/grids.py

Forward and backward passes of the same number of tokens take turns; printed are medians over the
rounds, with the least and the most, and their ratio to the square's. `padded` has the whole-frame
path: every sample its own grid, interpolated positions, and a tenth of the tokens padding; only
true tokens count.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from models.encoders.vit import VisionTransformer, build_encoder
from models.image_size import ImageSize


@dataclass(frozen=True, kw_only=True)
class GridsConfig:
    """What is timed."""

    encoder: str = "vit_ti"
    """Preset of the encoder."""
    batch: int = 32
    """Pictures in a pass."""
    rounds: int = 15
    """Turns of every grid; the first is not counted."""
    threads: int = 1
    """Threads of torch."""


GRIDS: dict[str, tuple[ImageSize, bool]] = {
    "square": (192, False),
    "rectangle": ((144, 256), False),
    "padded": ((144, 256), True),
}
"""The size of the input and whether every sample has its own grid; all have 144 patches of 16."""


def passes(encoder: VisionTransformer, batch: int, own_grids: bool) -> tuple[float, int]:
    """Times a forward and backward pass, in seconds, and counts its tokens."""
    count = encoder.num_patches
    patches_BNP = torch.randn(batch, count, 3 * encoder.patch_size**2)
    ids_BN = torch.arange(count).expand(batch, -1)
    grids_B2: Tensor | None = None
    valid_BN: Tensor | None = None
    tokens = batch * count
    if own_grids:
        rows, columns = encoder.grid.rows, encoder.grid.columns
        grids_B2 = torch.tensor([[rows, columns]]).expand(batch, -1).contiguous()
        valid_BN = ids_BN < round(0.9 * count)
        tokens = int(valid_BN.sum())
    start = time.perf_counter()
    encoder.forward_tokens(patches_BNP, ids_BN, grids_B2, valid_BN).square().mean().backward()
    seconds = time.perf_counter() - start
    encoder.zero_grad()
    return seconds, tokens


def main(cfg: GridsConfig) -> None:
    """Prints the table as Markdown."""
    torch.set_num_threads(cfg.threads)
    encoders = {
        name: build_encoder(cfg.encoder, image_size=size, patch_size=16)
        for name, (size, _) in GRIDS.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in GRIDS}
    for number in range(cfg.rounds + 1):
        for name, (_, own_grids) in GRIDS.items():
            seconds, tokens = passes(encoders[name], cfg.batch, own_grids)
            if number:
                rates[name].append(tokens / seconds)
    square = statistics.median(rates["square"])
    print("| grid | tokens/s, median (least to most) | of the square's |")
    print("|---|---|---|")
    for name, found in rates.items():
        middle = statistics.median(found)
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        print(f"| {name} | {middle:,.0f} ({spread}) | {middle / square:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(GridsConfig, description=__doc__))
