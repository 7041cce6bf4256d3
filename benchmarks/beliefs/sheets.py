"""Contact sheets of what a predictor expects, as PNG files.

Shape suffixes: B samples, C channels, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from pipelines.evaluation.beliefs.panels import Panel

ZOOM, GAP, MARGIN, HEAD = 3, 4, 92, 16
PAPER, INK = 255, (40, 40, 40)


def write_sheet(panels: Sequence[Panel], count: int, file: Path, zoom: int = ZOOM) -> None:
    """Draws one panel a row, with the samples, or the frames of each clip, side by side."""
    strips = [[_strip(sample) for sample in panel.pixels[:count]] for panel in panels]
    high, wide = (side * zoom for side in strips[0][0].shape[:2])
    size = (MARGIN + count * (wide + GAP), len(panels) * (high + GAP))
    sheet = Image.new("RGB", size, (PAPER,) * 3)
    pen = ImageDraw.Draw(sheet)
    for row, (panel, samples) in enumerate(zip(panels, strips, strict=True)):
        top = row * (high + GAP)
        pen.text((4, top + high // 2 - 5), panel.title, fill=INK)
        for column, strip in enumerate(samples):
            picture = Image.fromarray(strip).resize((wide, high), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + column * (wide + GAP), top))
    sheet.quantize(128).save(file, optimize=True)


def _strip(pixels: Tensor) -> np.ndarray:
    """Returns an image [H, W, C], or the frames of a clip side by side with a gap of a pixel."""
    if pixels.ndim == 3:
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    frames = pixels.permute(1, 2, 3, 0).numpy()
    padded = [np.pad(f, ((0, 0), (0, 1), (0, 0)), constant_values=PAPER) for f in frames]
    return np.ascontiguousarray(np.concatenate(padded, axis=1)[:, :-1])
