"""Pictures of a report: charts as SVG text, images and masks as data URIs, nothing external.

Shape suffixes: N images or clips, T tokens (patches), F frames, D feature width, H and W pixels,
C channels.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.image_size import Grid

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 24
MOST_POINTS = 400
CLIP_SIDE, FRAME_MS = 96, 125
ABSENT = 128
BLOCK_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167))  # Okabe and Ito


def image_uri(image_HWC: np.ndarray) -> str:
    """Encodes a uint8 picture as a PNG data URI at its own size; the page enlarges its pixels."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(sink, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()


def picture_uri(pixels: np.ndarray) -> str:
    """Encodes an image as `image_uri` does, and a clip [F, H, W, C] as a GIF that loops forever.

    Clips are shrunk to `CLIP_SIDE` pixels: a report holds over a hundred of them.
    """
    if pixels.ndim == 3:
        return image_uri(pixels)
    frames = [Image.fromarray(np.ascontiguousarray(frame)) for frame in pixels]
    for frame in frames:
        frame.thumbnail((CLIP_SIDE, CLIP_SIDE))
    sink = io.BytesIO()
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return "data:image/gif;base64," + base64.b64encode(sink.getvalue()).decode()


def masked_clip(
    clip_FHWC: np.ndarray, context_K: np.ndarray, target_T: np.ndarray, grid: Grid, tubelet: int
) -> np.ndarray:
    """Draws a clip: the context unchanged, the targets tinted, and everything else faded."""
    frames = []
    for number, frame_HWC in enumerate(clip_FHWC):
        step, patches = number // tubelet, grid.per_step
        context, target = (ids[ids // patches == step] % patches for ids in (context_K, target_T))
        picture = context_picture(frame_HWC, context, grid)
        tint = 0.4 * frame_HWC + 0.6 * np.array(BLOCK_COLOURS[0])
        hidden = _patch_mask(frame_HWC, target, grid)
        frames.append(np.where(hidden[..., None], tint, picture).astype(np.uint8))
    return np.stack(frames)


def context_picture(image_HWC: np.ndarray, context_K: np.ndarray, grid: Grid) -> np.ndarray:
    """Draws the picture with every patch outside the context faded to grey."""
    shown = _patch_mask(image_HWC, context_K, grid)
    return np.where(shown[..., None], image_HWC, 0.12 * image_HWC + 112).astype(np.uint8)


def target_picture(image_HWC: np.ndarray, targets_MT: np.ndarray, grid: Grid) -> np.ndarray:
    """Draws the picture with each target block in a colour of its own and the rest faded."""
    picture = 0.3 * image_HWC + 90
    for index, block_T in enumerate(targets_MT):
        tint = 0.5 * image_HWC + 0.5 * np.array(BLOCK_COLOURS[index % len(BLOCK_COLOURS)])
        picture = np.where(_patch_mask(image_HWC, block_T, grid)[..., None], tint, picture)
    return picture.astype(np.uint8)


def without(pixels: np.ndarray, kept_M: np.ndarray | None, grid: Grid) -> np.ndarray:
    """Blackens the patches that are left out of an image [H, W, C] or a clip [F, H, W, C].

    Args:
        pixels: the picture.
        kept_M: which patches of a time step are kept; None for all.
        grid: their grid.
    """
    if kept_M is None:
        return pixels
    kept_HW = _patch_mask(pixels[0] if pixels.ndim == 4 else pixels, np.flatnonzero(kept_M), grid)
    return np.where(kept_HW[..., None], pixels, np.uint8(0))


def _patch_mask(image_HWC: np.ndarray, tokens: np.ndarray, grid: Grid) -> np.ndarray:
    """Returns which pixels belong to these patches, bool [H, W]."""
    chosen = np.zeros(grid.per_step, dtype=bool)
    chosen[tokens] = True
    patch = image_HWC.shape[0] // grid.rows
    return np.kron(chosen.reshape(grid.rows, grid.columns), np.ones((patch, patch), dtype=bool))


def pca_pictures(tokens_NTD: np.ndarray, shown: int, grid: Grid) -> np.ndarray:
    """Draws the three main directions of patch features as red, green and blue.

    The mean of every position is removed first, so that a colour depends on the content of a patch
    and not on its place.

    Args:
        tokens_NTD: patch features, NaN where there is none, which is drawn grey; the directions are
            fitted on all samples.
        shown: how many of the first samples to draw.
        grid: the grid of the T tokens.

    Returns:
        uint8 [shown, rows, columns, 3], or [shown, tubes, rows, columns, 3] for clips.
    """
    there_NT = np.isfinite(tokens_NTD[..., 0])
    known_NTD = np.where(there_NT[..., None], tokens_NTD, 0)
    centred = known_NTD - known_NTD.sum(axis=0) / np.maximum(there_NT.sum(axis=0), 1)[:, None]
    flat = centred[there_NT].astype(np.float64)
    _, directions = np.linalg.eigh(flat.T @ flat)
    scores = flat @ directions[:, :-4:-1]
    # A direction's sign is arbitrary; fixing it makes the picture the same on every machine.
    scores *= np.sign((scores**3).sum(axis=0) + 1e-30)
    low, high = np.percentile(scores, (2, 98), axis=0)
    values = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    pictures = np.full((*there_NT.shape, 3), ABSENT, np.uint8)
    pictures[there_NT] = 255 * values
    steps = () if grid.tubes == 1 else (grid.tubes,)
    return pictures.reshape(len(pictures), *steps, grid.rows, grid.columns, 3)[:shown]


def line_chart(points: Points, label: str, *, scale: float = 1.0) -> str:
    """Draws one curve, with a dot at its end, as an SVG that takes its colours from the page.

    Args:
        points: at least one (step, value); values that are not finite are left out.
        label: description for screen readers.
        scale: factor for the values, such as 100 for per cent.
    """
    points = [(x, scale * y) for x, y in points if math.isfinite(y)]
    points = points[:: max(1, math.ceil(len(points) / MOST_POINTS))]
    return chart([Curve(points, points[-1])], label) if points else ""


@dataclass(frozen=True)
class Curve:
    """One curve of a chart."""

    points: Points
    """At least one (x, y), from left to right."""
    dot: tuple[float, float]
    """The point that gets a dot."""
    beside: bool = False
    """Drawn in a paler colour and dashed, to be compared with."""


def chart(curves: Sequence[Curve], label: str) -> str:
    """Draws curves over the same axes, the horizontal one from 0, as an SVG in the page's colours.

    Args:
        curves: at least one; the first ones lie on top.
        label: description for screen readers.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_ticks, y_ticks = _ticks(0.0, max(xs), 4), _ticks(min(ys), max(ys), 4)
    x_range, y_range = (0.0, max(x_ticks[-1], max(xs))), (y_ticks[0], y_ticks[-1])

    def px(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return (
            HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for y in y_ticks:
        parts.append(f'<path class="rule" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        if x <= x_range[1]:
            at = f'x="{px(x):.1f}" y="{HEIGHT - 6}"'
            parts.append(f'<text {at} text-anchor="middle">{_short(x)}</text>')
    for curve in reversed(curves):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in curve.points)
        beside = " beside" if curve.beside else ""
        parts.append(f'<polyline class="curve{beside}" points="{path}"/>')
        x, y = curve.dot
        parts.append(f'<circle class="end{beside}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5"/>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Returns round numbers that cover `low` to `high` in about `count` steps."""
    spread = high - low
    if spread <= 1e-9 * abs(high):  # a constant, apart from rounding
        spread = abs(high) or 1.0
    rough = spread / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
