"""HUD C: light cards in the corners, a ring of health, a round map and a list of what changed.

Shape suffixes: H height, W width, N places.
"""

from __future__ import annotations

from functools import lru_cache
from math import cos, hypot, pi, sin

from PIL import Image

from pipelines.fetchers.games.engine import U8
from pipelines.fetchers.games.hud_art import RGBA, Overlay, Panel
from pipelines.fetchers.games.hud_values import Event, Gauge, HudValues

FONT = "DejaVuSerif-Bold"
ICONS = {
    **{"health": "important", "ammo": "storm", "kills": "stop"},
    **{"lives": "angel", "score": "joystick", "clock": "clock"},
}
PAPER: RGBA = (244, 240, 228, 235)
INK: RGBA = (24, 60, 64, 255)
TEAL: RGBA = (0, 150, 140, 255)
ROSE: RGBA = (214, 40, 90, 255)
TRACK: RGBA = (150, 160, 160, 255)
RING, MAP = 25.0, 25.0  # diameters
CARD, LINE = (27.0, 11.0), (22.0, 8.0)  # width and height
MAP_REACH = 450.0  # game units from the middle of the map to its edge


def draw_hud_c(frame_HW3: U8, values: HudValues) -> U8:
    """Draws HUD C over a frame; returns a new one, [H, W, 3]."""
    overlay = Overlay(frame_HW3)
    unit, right, bottom = overlay.unit, overlay.width - 1, overlay.height - 1
    overlay.put(ring_panel(values.main, unit), 1, bottom - RING)
    first, second = values.others
    overlay.put(card_panel(first, unit), right - CARD[0], bottom - CARD[1])
    overlay.put(card_panel(second, unit), right - CARD[0], 1)
    for number, event in enumerate(values.events):
        overlay.put(line_panel(event, unit), right - LINE[0], CARD[1] + 4 + number * (LINE[1] + 1))
    if values.trail_N2:
        overlay.put(map_panel(values, unit), 1, 1)
    return overlay.finish()


@lru_cache(maxsize=512)
def ring_panel(gauge: Gauge, unit: float) -> Image.Image:
    """A ring that is closed to the gauge's share, with the number in it."""
    panel = Panel(RING, RING, unit)
    panel.draw.ellipse(panel.px(0, 0, RING, RING), fill=PAPER)
    box, width = panel.px(1, 1, RING - 1, RING - 1), round(panel.px(3.6)[0])
    panel.draw.arc(box, 0, 360, TRACK, width)
    colour = TEAL if gauge.share > 0.4 else ROSE
    panel.draw.arc(box, -90, -90 + 360 * gauge.share, colour, width)
    panel.text(gauge.text, (5.5, RING / 2 - 5, RING - 5.5, RING / 2 + 5), FONT, INK)
    return panel.finish()


@lru_cache(maxsize=512)
def card_panel(gauge: Gauge, unit: float) -> Image.Image:
    """A card with a number and, at its right, an icon in one colour."""
    panel, (width, height) = Panel(*CARD, unit), CARD
    panel.draw.rounded_rectangle(panel.px(0, 0, width, height), panel.px(3)[0], fill=PAPER)
    panel.icon(ICONS[gauge.name], width - 10, 1, height - 2, TEAL)
    panel.text(gauge.text, (1.5, 0.5, width - 10.5, height - 0.5), FONT, INK)
    return panel.finish()


@lru_cache(maxsize=512)
def line_panel(event: Event, unit: float) -> Image.Image:
    """One change, such as +1 and the icon of kills."""
    panel, (width, height) = Panel(*LINE, unit), LINE
    colour = TEAL if event.change > 0 else ROSE
    panel.draw.rounded_rectangle(panel.px(0, 0, width, height), panel.px(4)[0], fill=colour)
    panel.icon(ICONS[event.name], 0.8, 0.5, height - 1, PAPER)
    panel.text(event.text, (8, 0, width - 1, height), FONT, PAPER)
    return panel.finish()


def map_panel(values: HudValues, unit: float) -> Image.Image:
    """The player stands in the middle and looks up; the trail turns around."""
    panel, middle = Panel(MAP, MAP, unit), MAP / 2
    panel.draw.ellipse(
        panel.px(0, 0, MAP, MAP), fill=PAPER, outline=TEAL, width=round(panel.px(1.5)[0])
    )
    scale, turn, reach = middle / MAP_REACH, pi / 2 - values.heading, middle - 2
    x0, y0 = values.trail_N2[-1]
    for x, y in values.trail_N2[:-1:3]:
        east, north = (x - x0) * scale, (y - y0) * scale
        right, up = east * cos(turn) - north * sin(turn), east * sin(turn) + north * cos(turn)
        if hypot(right, up) < reach:
            at = middle + right, middle - up
            panel.draw.ellipse(panel.px(at[0] - 1, at[1] - 1, at[0] + 1, at[1] + 1), fill=INK)
    tip = [(0.0, 4.0), (3.0, -3.0), (-3.0, -3.0)]
    panel.draw.polygon([panel.px(middle + x, middle - y) for x, y in tip], ROSE)
    return panel.finish()
