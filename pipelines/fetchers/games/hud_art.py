"""Draws small panels: text, icons and shapes on a transparent ground.

Lengths are in units; a frame is at least 72 units high and 96 wide, and one unit is one pixel in a
frame of 72 x 128. A panel is drawn `OVERSAMPLING` times as large and then made smaller, so that
shapes and letters of few pixels have smooth edges.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipelines.fetchers.games.engine import U8

ICONS = Path(__file__).parent / "icons"
OVERSAMPLING = 4
UNITS_HIGH, UNITS_WIDE = 72, 96

RGBA = tuple[int, int, int, int]


class Panel:
    """One panel of a HUD while it is drawn.

    Args:
        width: in units.
        height: in units.
        unit: pixels of the frame a unit.
    """

    def __init__(self, width: float, height: float, unit: float) -> None:
        self._unit = unit
        self._sides = max(1, round(width * unit)), max(1, round(height * unit))
        large = (self._sides[0] * OVERSAMPLING, self._sides[1] * OVERSAMPLING)
        self._picture = Image.new("RGBA", large)
        self.draw = ImageDraw.Draw(self._picture)

    def px(self, *lengths: float) -> tuple[float, ...]:
        """Converts units to pixels of the enlarged panel, for `draw`."""
        return tuple(length * self._unit * OVERSAMPLING for length in lengths)

    def text(
        self, text: str, box: tuple[float, float, float, float], font: str, colour: RGBA
    ) -> None:
        """Writes one line in the middle of a box (left, top, right, bottom), as large as fits."""
        left, top, right, bottom = self.px(*box)
        size = int(bottom - top)
        face = load_font(font, size)
        if (length := face.getlength(text)) > right - left:
            face = load_font(font, max(1, int(size * (right - left) / length)))
        middle = (left + right) / 2, (top + bottom) / 2
        self.draw.text(middle, text, font=face, fill=colour, anchor="mm")

    def icon(
        self, name: str, left: float, top: float, side: float, tint: RGBA | None = None
    ) -> None:
        """Pastes an icon; `tint` makes its bright parts that colour and its dark ones darker."""
        x, y, length = (round(value) for value in self.px(left, top, side))
        picture = load_icon(name, length, tint)
        self._picture.alpha_composite(picture, (x, y))

    def finish(self) -> Image.Image:
        """Returns the panel in pixels of the frame."""
        return self._picture.resize(self._sides, Image.Resampling.BOX)


@lru_cache(maxsize=64)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Loads one of the fonts that come with matplotlib, such as `DejaVuSans-Bold`."""
    import matplotlib as mpl

    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=64)
def load_icon(name: str, side: int, tint: RGBA | None) -> Image.Image:
    """Loads an icon as RGBA of so many pixels a side."""
    picture = Image.open(ICONS / f"{name}.png").convert("RGBA")
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    if tint is None:
        return picture
    dark = tuple(channel // 3 for channel in tint[:3])
    shaded = ImageOps.colorize(picture.convert("L"), dark, tint[:3])
    shaded.putalpha(picture.getchannel("A"))
    return shaded


class Overlay:
    """A frame onto which finished panels are laid.

    Args:
        frame_HW3: the frame, which is copied.
    """

    def __init__(self, frame_HW3: U8) -> None:
        height, width = frame_HW3.shape[:2]
        self.unit = min(height / UNITS_HIGH, width / UNITS_WIDE)
        self.height, self.width = height / self.unit, width / self.unit
        self._picture = Image.fromarray(frame_HW3).convert("RGBA")

    def put(self, panel: Image.Image, left: float, top: float) -> None:
        """Lays a panel over the frame; left and top are in units."""
        place = round(left * self.unit), round(top * self.unit)
        self._picture.alpha_composite(panel, place)

    def finish(self) -> U8:
        """Returns the frame, [H, W, 3]."""
        return np.asarray(self._picture.convert("RGB"))
