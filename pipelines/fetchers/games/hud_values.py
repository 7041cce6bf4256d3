"""What a drawn HUD shows at a frame, from the states up to it.

Shape suffixes: N places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import radians

TRAIL_SECONDS = 12
EVENT_SECONDS = 3
MOST_EVENTS = 3
MOST_GAUGES = 3  # where a game has fewer numbers, a clock is shown too
CLOCK = "clock"
# Columns of states that are shown, the main one first.
DOOM_GAUGES = {"HEALTH": "health", "SELECTED_WEAPON_AMMO": "ammo", "KILLCOUNT": "kills"}
ATARI_GAUGES = {"lives": "lives", "score": "score"}
FULL_HEALTH = 100.0


@dataclass(frozen=True)
class Gauge:
    """A number on display.

    Attributes:
        name: `health`, `ammo`, `kills`, `lives`, `score` or `clock`.
        value: the number; seconds for a clock.
        share: the number as a share of the largest possible or largest seen, from 0 to 1.
    """

    name: str
    value: int
    share: float = 0.0

    @property
    def text(self) -> str:
        """The number in at most four characters; a weapon without ammunition has -1 of it."""
        if self.name == CLOCK:
            return f"{self.value // 60}:{self.value % 60:02d}"
        if self.name == "ammo" and self.value < 0:
            return "--"
        return str(self.value) if abs(self.value) < 10_000 else f"{self.value // 1000}k"


@dataclass(frozen=True)
class Event:
    """A number that changed within the last `EVENT_SECONDS`."""

    name: str
    change: int

    @property
    def text(self) -> str:
        """The change with its sign."""
        return f"{self.change:+d}"


@dataclass(frozen=True)
class HudValues:
    """What a HUD shows at one frame.

    Attributes:
        main: health or lives.
        others: the other numbers.
        events: the last changes, latest first, at most `MOST_EVENTS`.
        trail_N2: x and y, in the game's units, of the last `TRAIL_SECONDS`, the present last; empty
            where the game does not say where the player is.
        start: x and y at the first frame, or None.
        heading: radians counter-clockwise from the x axis.
    """

    main: Gauge
    others: tuple[Gauge, ...]
    events: tuple[Event, ...] = ()
    trail_N2: tuple[tuple[float, float], ...] = ()
    start: tuple[float, float] | None = None
    heading: float = 0.0


class HudTracker:
    """Follows the states of one episode.

    Args:
        variables: the names of a state's values.
        rate: frames a second.
    """

    def __init__(self, variables: Sequence[str], rate: Fraction) -> None:
        self._column = {name: column for column, name in enumerate(variables)}
        self._rate, self._frame = rate, -1
        known = DOOM_GAUGES if "HEALTH" in self._column else ATARI_GAUGES
        self._gauges = {name: shown for name, shown in known.items() if name in self._column}
        self._last: dict[str, int] = {}
        self._most: dict[str, int] = {}
        self._events: deque[tuple[int, Event]] = deque(maxlen=MOST_EVENTS)
        self._trail: deque[tuple[float, float]] = deque(maxlen=int(TRAIL_SECONDS * rate))
        self._start: tuple[float, float] | None = None

    def update(self, state: Sequence[float]) -> HudValues:
        """Returns what is shown at the next frame, which has this state."""
        self._frame += 1
        gauges = [self._gauge(n, state[self._column[n]]) for n in self._gauges]
        clock = Gauge(CLOCK, int(self._frame / self._rate))
        heading = self._follow_player(state)
        newest = self._frame - EVENT_SECONDS * self._rate
        events = [event for frame, event in reversed(self._events) if frame > newest]
        main, *others = [*gauges, clock][:MOST_GAUGES]
        return HudValues(
            main, tuple(others), tuple(events), tuple(self._trail), self._start, heading
        )

    def _gauge(self, column: str, value: float) -> Gauge:
        name, number = self._gauges[column], int(value)
        change = number - self._last.get(name, number)
        self._last[name] = number
        self._most[name] = max(self._most.get(name, 1), number)
        if change and name != "ammo":
            self._events.append((self._frame, Event(name, change)))
        full = FULL_HEALTH if name == "health" else self._most[name]
        return Gauge(name, number, min(max(number / full, 0.0), 1.0))

    def _follow_player(self, state: Sequence[float]) -> float:
        if "POSITION_X" not in self._column:
            return 0.0
        x, y, degrees = (state[self._column[n]] for n in ("POSITION_X", "POSITION_Y", "ANGLE"))
        self._trail.append((x, y))
        self._start = self._start or (x, y)
        return radians(degrees)
