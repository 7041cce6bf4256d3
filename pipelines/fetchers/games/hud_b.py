"""HUD B: a dark column with coloured icons at the left, and a square map at the top right.

Shape suffixes: H height, W width, N places.
"""

from __future__ import annotations

from functools import lru_cache
from math import cos, sin

from PIL import Image

from pipelines.fetchers.games.engine import U8
from pipelines.fetchers.games.hud_art import RGBA, Overlay, Panel
from pipelines.fetchers.games.hud_values import Gauge, HudValues

FONT = "DejaVuSansMono-Bold"
ICONS = {
    **{"health": "favorite", "ammo": "battery", "kills": "devilish"},
    **{"lives": "grin", "score": "games", "clock": "clock"},
}
GROUND: RGBA = (12, 16, 40, 200)
MAP_GROUND: RGBA = (12, 16, 40, 130)
FRAME: RGBA = (250, 190, 60, 255)
TEXT: RGBA = (255, 226, 150, 255)
PLAYER: RGBA = (255, 255, 255, 255)
COLUMN, ROW = 19.0, 21.0  # width of the column, height of a number in it
MAP = 26.0
MAP_SPAN = 1000.0  # game units from one side of the map to the other


def draw_hud_b(frame_HW3: U8, values: HudValues) -> U8:
    """Draws HUD B over a frame; returns a new one, [H, W, 3]."""
    overlay = Overlay(frame_HW3)
    gauges = (values.main, *values.others)
    top = (overlay.height - ROW * len(gauges)) / 2
    for number, gauge in enumerate(gauges):
        overlay.put(number_panel(gauge, overlay.unit), 0, top + number * ROW)
    if values.trail_N2:
        overlay.put(map_panel(values, overlay.unit), overlay.width - MAP - 1, 1)
    return overlay.finish()


@lru_cache(maxsize=512)
def number_panel(gauge: Gauge, unit: float) -> Image.Image:
    """An icon, the number below it, and a bar of its share."""
    panel = Panel(COLUMN, ROW, unit)
    panel.draw.rectangle(panel.px(0, 0, COLUMN, ROW), fill=GROUND)
    panel.draw.rectangle(panel.px(COLUMN - 0.6, 0, COLUMN, ROW), fill=FRAME)
    panel.icon(ICONS[gauge.name], COLUMN / 2 - 4.5, 0.5, 8.5)
    panel.text(gauge.text, (1, 9, COLUMN - 1.5, 18.5), FONT, TEXT)
    panel.draw.rectangle(panel.px(2, 18.7, COLUMN - 2.5, 20.2), fill=(60, 60, 80, 255))
    length = (COLUMN - 4.5) * gauge.share
    panel.draw.rectangle(panel.px(2, 18.7, 2 + length, 20.2), fill=FRAME)
    return panel.finish()


def map_panel(values: HudValues, unit: float) -> Image.Image:
    """North is up, and the place where the episode began is in the middle."""
    assert values.start is not None
    panel, (x0, y0) = Panel(MAP, MAP, unit), values.start
    panel.draw.rectangle(
        panel.px(0, 0, MAP, MAP), fill=MAP_GROUND, outline=FRAME, width=round(panel.px(0.7)[0])
    )
    scale = MAP / MAP_SPAN

    def place(x: float, y: float) -> tuple[float, float]:
        inside = [min(max(MAP / 2 + d * scale, 2), MAP - 2) for d in (x - x0, y0 - y)]
        return inside[0], inside[1]

    line = [panel.px(*place(x, y)) for x, y in values.trail_N2]
    panel.draw.line([value for point in line for value in point], FRAME, round(panel.px(0.9)[0]))
    x, y = place(*values.trail_N2[-1])
    tips = [(values.heading + turn, length) for turn, length in ((0, 4.0), (2.5, 2.6), (-2.5, 2.6))]
    panel.draw.polygon(
        [panel.px(x + length * cos(a), y - length * sin(a)) for a, length in tips], PLAYER
    )
    return panel.finish()
