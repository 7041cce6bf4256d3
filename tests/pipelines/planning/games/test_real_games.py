"""The real engines: the rooms of `my_way_home`, its oracle, and where Breakout's memory says.

Both engines are in the extra `games`; without them these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.planning.games.floor_plan import FloorPlan, read_floor_plan
from pipelines.planning.games.navigation import KINDS, draw_tasks, map_policy, run_episode
from pipelines.planning.games.walks import walk
from pipelines.planning.games.worlds import GAME_WORLDS, Player


@pytest.fixture(scope="module")
def plan() -> FloorPlan:
    pytest.importorskip("vizdoom", reason="needs the extra `games`")
    return read_floor_plan("my_way_home")


@pytest.fixture(scope="module")
def doom() -> Iterator[Player]:
    pytest.importorskip("vizdoom", reason="needs the extra `games`")
    player = GAME_WORLDS["my_way_home"].start()
    yield player
    player.close()


def test_my_way_home_has_eight_rooms_all_of_which_can_be_reached(plan: FloorPlan) -> None:
    rooms = np.nonzero(plan.apart_SS.diagonal() == 0)[0]
    assert len(rooms) == 8
    apart = plan.apart_SS[np.ix_(rooms, rooms)]
    assert apart.min() == 0
    assert apart.max() == 5
    assert (apart == apart.T).all()
    assert np.isfinite(plan.ways(plan.centres_N2[0])).all()


def test_the_shortest_way_is_walked_in_the_real_game(plan: FloorPlan, doom: Player) -> None:
    walks = [walk(doom, seed, 40) for seed in range(6)]
    for kind in KINDS:
        for task in draw_tasks(doom, plan, walks, kind, 2, seed=0):
            episode = run_episode(doom, plan, map_policy(plan, task), task, 60)
            assert episode.reached, (kind, episode.path_TP[-1], task.goal_P)


def test_places_are_those_of_the_game_and_buttons_move_them(doom: Player) -> None:
    doom.reset(5)
    x, y, sine, cosine = doom.places()
    assert np.hypot(sine, cosine) == pytest.approx(1, abs=1e-5)
    doom.step(1)  # to the left
    *_, sine_after, cosine_after = doom.places()
    turned = np.arctan2(sine_after, cosine_after) - np.arctan2(sine, cosine)
    turned = (turned + np.pi) % (2 * np.pi) - np.pi
    assert 0.1 < turned < 1
    doom.reset(5)
    np.testing.assert_array_equal(doom.places(), [x, y, sine, cosine])
    assert doom.see().shape == (48, 64, 3)


def test_breakouts_memory_says_where_paddle_and_ball_are_seen() -> None:
    pytest.importorskip("ale_py", reason="needs the extra `games`")
    player = GAME_WORLDS["breakout"].start()
    player.reset(0)
    paddles, seen, balls, rows = [], [], [], []
    for step in range(120):
        pixels = player.see()[..., 0].astype(float)
        strip = pixels[57:59, 4:-4].mean(0)  # the rows of the paddle, without the side walls
        paddles.append(player.places()[0])
        seen.append((strip * np.arange(len(strip))).sum() / strip.sum())
        field = pixels[30:56, 4:-4].mean(1)  # between the bricks and the paddle
        if field.max() > 2 and not np.isnan(player.places()[2]):
            balls.append(player.places()[2])
            rows.append(float(field.argmax()))
        player.step((1, 2, 2, 3, 3, 3)[step % 6])
    player.close()
    assert np.std(paddles) > 5
    assert np.corrcoef(paddles, seen)[0, 1] > 0.98
    assert len(balls) > 10
    assert np.corrcoef(balls, rows)[0, 1] > 0.98
