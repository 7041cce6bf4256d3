"""Drawn HUDs show the recorded state, and Doom's counts and distances are those in view."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.fetchers.games.doom_view import view_values
from pipelines.fetchers.games.hud_b import draw_hud_b
from pipelines.fetchers.games.hud_c import draw_hud_c
from pipelines.fetchers.games.hud_values import Gauge, HudTracker, HudValues

DOOM = ("HEALTH", "SELECTED_WEAPON_AMMO", "KILLCOUNT", "POSITION_X", "POSITION_Y", "ANGLE")
RATE = Fraction(10)


def doom_values(*states: tuple[float, ...]) -> HudValues:
    tracker = HudTracker(DOOM, RATE)
    for state in states[:-1]:
        tracker.update(state)
    return tracker.update(states[-1])


def test_the_tracker_follows_doom() -> None:
    values = doom_values((100, 50, 0, 10, 20, 0), (80, 49, 0, 11, 20, 0), (80, 48, 1, 12, 20, 90))
    assert (values.main.name, values.main.value, values.main.share) == ("health", 80, 0.8)
    assert [(gauge.name, gauge.value) for gauge in values.others] == [("ammo", 48), ("kills", 1)]
    assert [(event.name, event.text) for event in values.events] == [
        ("kills", "+1"),
        ("health", "-20"),
    ]
    assert values.trail_N2 == ((10, 20), (11, 20), (12, 20))
    assert values.start == (10, 20)
    assert values.heading == pytest.approx(np.pi / 2)


def test_events_and_the_trail_end() -> None:
    states = [(100, 50, 0, 0, 0, 0), *((90, 50, 0, x, 0, 0) for x in range(1, 200))]
    assert len(doom_values(*states[:31]).events) == 1
    assert len(doom_values(*states[:32]).events) == 0  # 3 seconds after frame 1
    assert len(doom_values(*states).trail_N2) == 120


def test_atari_has_lives_a_score_and_a_clock() -> None:
    tracker = HudTracker(("score", "lives", "ram_0"), RATE)
    tracker.update((0, 4, 9))
    for _ in range(649):
        values = tracker.update((12_345, 3, 9))
    assert (values.main.name, values.main.share) == ("lives", 0.75)
    assert [gauge.text for gauge in values.others] == ["12k", "1:04"]
    assert values.trail_N2 == ()
    assert Gauge("ammo", -1).text == "--"


@pytest.mark.parametrize("draw", [draw_hud_b, draw_hud_c])
def test_what_is_drawn_follows_the_state(draw) -> None:
    """Every value of the state changes some pixels, none of them in the middle square."""
    frame = np.full((72, 128, 3), 120, np.uint8)
    base = (100, 50, 0, 10, 20, 0)
    shown = draw(frame, doom_values(base, base))
    np.testing.assert_array_equal(shown, draw(frame, doom_values(base, base)))
    assert (frame == 120).all()
    changed = [np.abs(shown.astype(int) - frame).max(2) > 0]
    for other in (
        (60, 50, 0, 10, 20, 0),
        (100, 49, 0, 10, 20, 0),
        (100, 50, 3, 10, 20, 0),
        (100, 50, 0, 200, 20, 0),
        (100, 50, 0, 10, 300, 0),
    ):
        drawn = draw(frame, doom_values(base, other))
        changed.append(np.abs(drawn.astype(int) - shown).max(2) > 30)
    for difference in changed:
        assert difference.sum() >= 5
        assert not difference[:, 28:100].any()


def test_the_round_map_turns_with_the_player() -> None:
    frame = np.zeros((72, 128, 3), np.uint8)
    trails = []
    for angle in (90, 0):  # walked east, and looks north or east
        walk = [(100, 50, 0, 30 * i, 0, angle) for i in range(9)]
        with_trail, without = (draw_hud_c(frame, doom_values(*w)) for w in (walk, walk[-1:]))
        changed = np.abs(with_trail.astype(int) - without).max(2)[1:26, 1:26] > 60
        trails.append(np.argwhere(changed).mean(0) - 12)
    assert trails[0] == pytest.approx([0, -5.4], abs=1)  # came from the left
    assert trails[1] == pytest.approx([5.4, 0], abs=1)  # came from below


def thing(value: int, x: float, y: float, name: str = "Demon", category: str = "Monster"):
    return SimpleNamespace(
        value=value,
        object_name=name,
        object_category=category,
        object_position_x=x,
        object_position_y=y,
    )


def test_objects_count_where_they_can_be_seen() -> None:
    labels = np.zeros((50, 100), np.uint8)
    depth = np.full((50, 100), 80, np.uint8)
    labels[0:5, 0:5], labels[0:5, 10:15], labels[0, 20], labels[40:50, 40:60] = 1, 2, 3, 255
    labels[10:20, 30:40] = 5
    depth[20:30, 40:50] = 10  # the left half of the middle fifth
    labels[20:23, 40:60] = 255
    depth[20:23, 40:60] = 1
    things = [
        *(thing(1, 30, 40), thing(2, 300, 400), thing(3, 1, 0), thing(4, 2, 0)),
        *(thing(5, 3, 0, "Blood", "Gibs"), thing(255, 0, 0, "DoomPlayer", "Self")),
    ]
    state = SimpleNamespace(labels=things, labels_buffer=labels, depth_buffer=depth)
    count, nearest, ahead = view_values(state, (0.0, 0.0))
    assert (count, nearest) == (3, 1)  # a pixel of 5,000 is 0.02% and counts; no pixel does not
    assert ahead == 45
    labels[:] = 255
    state.labels = things[-1:]
    count, nearest, ahead = view_values(state, (0.0, 0.0))
    assert count == 0
    assert np.isnan([nearest, ahead]).all()
