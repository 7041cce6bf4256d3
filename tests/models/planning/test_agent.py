"""Cost, critic and the loop of the agent, on the true simulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.planning.actors.actor import Actor, Search
from models.planning.agent import Agent, ShuffledModel, build_agent
from models.planning.configurator import Rules, TaskSpec, configure
from models.planning.costs import critic as critic_module
from models.planning.costs.critic import CriticTraining, train_critic, ways_to
from models.planning.costs.intrinsic import (
    Future,
    Hazard,
    IntrinsicCost,
    depth,
    effort,
    goal_distance,
    uncertainty,
)
from models.planning.memory import Memory
from models.planning.worlds.two_rooms import TrueModel, TwoRooms

WORLD = TwoRooms()


def future() -> Future:
    """Two predictors, one candidate, three steps."""
    latents = torch.tensor([[[[0.0, 0.0], [3.0, 4.0], [5.0, 5.0]]]]).repeat(2, 1, 1, 1)
    latents[1, 0, 2] = torch.tensor([5.0, 9.0])
    return Future(
        latents_EBTD=latents,
        actions_BTA=torch.tensor([[[1.0, 2.0], [0.0, 0.0], [0.5, 0.0]]]),
        goals_BD=torch.tensor([[0.0, 0.0]]),
    )


def test_terms_of_the_intrinsic_cost() -> None:
    far = (50**0.5 + 106**0.5) / 2
    torch.testing.assert_close(goal_distance(future()), torch.tensor([[0.0, 5.0, far]]))
    torch.testing.assert_close(effort(future()), torch.tensor([[5.0, 0.0, 0.25]]))
    torch.testing.assert_close(uncertainty(future()), torch.tensor([[0.0, 0.0, 2**0.5]]))
    hazard = Hazard(zones=((2.0, 2.0, 10.0, 10.0), (2.5, 0.0, 3.5, 9.0)), readout=lambda z: z)
    torch.testing.assert_close(hazard(future()), torch.tensor([[0.0, 1.0, 3.0]]))
    wide = Hazard(zones=((2.0, 2.0, 10.0, 10.0),), readout=lambda z: z, clearance=1.5)
    torch.testing.assert_close(wide(future()), torch.tensor([[0.0, 2.5, 4.5]]))
    both = IntrinsicCost(terms=((2.0, effort), (0.5, uncertainty)))
    torch.testing.assert_close(both(future()), 2 * effort(future()) + 0.5 * uncertainty(future()))


def run(
    agent: Agent, starts: Tensor, goals: Tensor, steps: int, visited: list[Tensor] | None = None
) -> Tensor:
    """Returns which goals were reached; `visited` takes the places on the way."""
    agent.begin(goals)
    places, reached = starts, WORLD.reached(starts, goals)
    for _ in range(steps):
        (rows,) = (~reached).nonzero(as_tuple=True)
        if not len(rows):
            break
        places = places.clone()
        places[rows] = WORLD.step(places[rows], agent.plan(places[rows], rows)[:, 0])
        reached = reached | WORLD.reached(places, goals)
        if visited is not None:
            visited.append(places)
    return reached


def agent(model: object, **settings) -> Agent:
    actor = Actor(search=Search(horizon=8, samples=40, elites=6), limit=WORLD.shortened)
    return Agent(model, actor, IntrinsicCost(), action_width=2, **settings)


def pairs(count: int, same: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    starts, goals = (WORLD.sample_places(8 * count, generator) for _ in range(2))
    alike = WORLD.room(starts) == WORLD.room(goals)
    wanted = (alike if same else ~alike) & ((starts - goals).norm(dim=-1) > 5)
    return starts[wanted][:count], goals[wanted][:count]


def test_with_the_true_model_the_agent_arrives_and_with_shuffled_actions_it_does_not() -> None:
    starts, goals = pairs(30, same=True)
    true = TrueModel(world=WORLD)
    assert run(agent(true), starts, goals, 40).float().mean() > 0.9
    assert run(agent(ShuffledModel(model=true)), starts, goals, 40).float().mean() < 0.3


def test_memory_holds_every_plan_by_where_it_was_made() -> None:
    starts, goals = pairs(4, same=True)
    memory = Memory(1000)
    run(agent(TrueModel(world=WORLD), memory=memory, recalled=1), starts, goals, 3)
    rows = {name: column.flip(0) for name, column in memory.recent(99).items()}  # oldest first
    assert rows["key"].shape == (12, 4)
    assert rows["plan"].shape == (12, 8, 2)
    torch.testing.assert_close(rows["key"][:4], torch.cat([starts, goals], dim=-1))
    follows = WORLD.step(rows["key"][:-4, :2], rows["plan"][:-4, 0])
    torch.testing.assert_close(follows, rows["key"][4:, :2])


def test_a_remembered_plan_helps_where_the_budget_is_small() -> None:
    """The way to the goal leads away from it, which a search of four samples hardly finds."""
    starts, goals = torch.tensor([[13.0, 11.0]] * 20), torch.tensor([[19.0, 11.0]] * 20)
    config = configure(TaskSpec(budget=96), Rules(rounds=1, recalled=1))
    place, way = starts[:1], []
    for _ in range(config.search.horizon):
        way.append(WORLD.way_out(place, goals[:1]))
        place = WORLD.step(place, way[-1])
    reached = {}
    for known in (False, True):
        made = build_agent(config, TrueModel(world=WORLD), limit=WORLD.shortened, action_width=2)
        if known:
            made.memory.write(torch.cat([starts, goals], -1)[:1], plan=torch.stack(way, 1))
        reached[known] = float(run(made, starts, goals, 20).float().mean())
    assert reached[False] < 0.4
    assert reached[True] > 0.9


def test_where_frames_are_hidden_the_agent_goes_on_with_what_it_expected() -> None:
    starts, goals = pairs(30, same=True)
    reached = {}
    for memory in (Memory(50), None):
        blind = agent(TrueModel(world=WORLD), memory=memory)
        blind.begin(goals)
        places, rows = starts, torch.arange(len(starts))
        done = WORLD.reached(places, goals)
        for step in range(30):
            hidden = torch.full((len(rows),), step % 8 >= 2)
            shown = torch.where(hidden[:, None], torch.full_like(places, 16.0), places)
            places = WORLD.step(places, blind.plan(shown, rows, hidden)[:, 0])
            done = done | WORLD.reached(places, goals)
        reached[memory is not None] = float(done.float().mean())
    assert reached[True] > 0.9
    assert reached[False] < 0.6


def test_a_zone_is_kept_out_of_only_if_the_task_names_it() -> None:
    starts, goals = torch.tensor([[8.0, 8.0]] * 6), torch.tensor([[8.0, 24.0]] * 6)
    zone = (5.0, 13.0, 11.0, 19.0)  # on the straight way
    deepest = {}
    for zones in ((), (zone,)):
        config = configure(TaskSpec(zones=zones, steps=40))
        made = build_agent(
            config,
            TrueModel(world=WORLD),
            limit=WORLD.shortened,
            action_width=2,
            readout=lambda places: places,
        )
        visited: list[Tensor] = []
        assert run(made, starts, goals, 40, visited).all()
        deepest[zones] = int((depth(torch.cat(visited), (zone,)) > 1).sum())
    assert deepest[()] > 6
    assert deepest[zone,] < 0.2 * deepest[()]


def test_the_budget_decides_how_many_plans_are_tried() -> None:
    small, large = (configure(TaskSpec(budget=budget)).search for budget in (960, 9600))
    assert (small.samples, large.samples) == (20, 200)
    assert (small.elites, large.elites) == (2, 20)
    for rules in (Rules(), Rules(elites=1.0)):  # a search that keeps all its samples selects none
        assert configure(TaskSpec(budget=96), rules).search.elites == 1
    assert configure(TaskSpec(steps=5)).search.horizon == 5
    with pytest.raises(ValueError, match=r"--budget: needs at least 96 imagined steps, got 50"):
        configure(TaskSpec(budget=50))
    with pytest.raises(ValueError, match=r"--rules.horizon: must be between 1 and 10000, got 0"):
        Rules(horizon=0)


@pytest.mark.parametrize("method", ["cem", "icem", "mppi", "shooting"])
@pytest.mark.parametrize("recalled", [0, 4])
def test_an_action_costs_no_more_than_its_budget(method: str, recalled: int) -> None:
    imagined = []

    class Counting(TrueModel):
        def rollout(self, places: Tensor, actions: Tensor) -> Tensor:
            imagined.append(actions.shape[0] * actions.shape[1])
            return super().rollout(places, actions)

    config = configure(TaskSpec(budget=1000, method=method), Rules(recalled=recalled))
    made = build_agent(config, Counting(world=WORLD), limit=WORLD.shortened, action_width=2)
    starts, goals = torch.tensor([[8.0, 8.0]]), torch.tensor([[24.0, 8.0]])
    made.begin(goals)
    for _ in range(6):
        imagined.clear()
        made.plan(starts, torch.arange(1))
    assert 800 < sum(imagined) <= 1000


def test_the_same_weights_do_two_tasks_only_if_the_configurator_reads_the_task() -> None:
    """Reach; and reach while staying out of a zone. Either setting alone fails at one of them."""
    zone = (5.0, 12.0, 11.0, 20.0)
    starts = torch.tensor([[8.0, 6.0], [6.5, 7.0], [9.0, 6.0]])
    inside = torch.tensor([[8.0, 16.0], [8.0, 15.0], [7.5, 16.0]])  # reach: the goal is in the zone
    behind = torch.tensor([[8.0, 26.0], [7.5, 25.0], [9.0, 26.0]])  # stay out: it is behind it
    tasks = {"reach": (TaskSpec(), inside), "avoid": (TaskSpec(zones=(zone,)), behind)}

    def success(told: TaskSpec, task: str) -> float:
        made = build_agent(
            configure(told),
            TrueModel(world=WORLD),
            limit=WORLD.shortened,
            action_width=2,
            readout=lambda places: places,
        )
        visited: list[Tensor] = []
        reached = run(made, starts, tasks[task][1], 40, visited)
        entered = task == "avoid" and bool((depth(torch.cat(visited), (zone,)) > 0).any())
        return float(reached.float().mean()) * (not entered)

    configured = [success(tasks[task][0], task) for task in tasks]
    fixed = {told: [success(tasks[told][0], task) for task in tasks] for told in tasks}
    assert configured == [1.0, 1.0]
    assert all(sum(of) < 1.5 for of in fixed.values()), fixed


def walked() -> Memory:
    """Places of random walks and what followed them."""
    places_BT2, _ = WORLD.random_walk(250, 16, torch.Generator().manual_seed(0))
    memory = Memory(4000)
    memory.write(places_BT2[:, :-1].flatten(0, 1), following=places_BT2[:, 1:].flatten(0, 1))
    return memory


def around(places: Tensor, goals: Tensor) -> Tensor:
    """The length of the shortest way through the middle of the door."""
    door = torch.tensor([16.0, 16.0])
    return (places - door).norm(dim=-1) + (goals - door).norm(dim=-1)


def test_ways_lead_round_the_wall() -> None:
    rows = walked().recent(4000)
    places, following = rows["key"], rows["following"]
    goals = torch.arange(0, 4000, 40)
    ways = ways_to(places, following, goals, reach=1.0)
    assert ways.isfinite().float().mean() > 0.95
    assert (ways[goals, torch.arange(100)] == 0).all()
    straight = torch.cdist(places, places[goals])
    assert (ways >= straight - 0.1).all()  # nothing is shorter than straight
    rooms = WORLD.room(places)
    known = ways.isfinite() & (straight > 6)
    same = known & (rooms[:, None] == rooms[goals])
    across = known & (rooms[:, None] == 1 - rooms[goals])
    assert (ways / straight)[same].median() < 1.2
    through = around(places[:, None], places[goals])
    assert ((ways / through)[across] > 0.85).float().mean() > 0.99
    assert (ways / through)[across].median() < 1.25


def test_distances_are_measured_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    following, goals = states.roll(1, 0), torch.arange(5)
    whole = ways_to(states, following, goals, reach=1.5)
    monkeypatch.setattr(critic_module, "PAIRS", 30 * 90)
    torch.testing.assert_close(ways_to(states, following, goals, reach=1.5), whole)
    assert whole.isfinite().float().mean() > 0.5


def test_a_sparse_memory_with_long_edges_would_leap_over_the_wall() -> None:
    rows = {name: column[::20] for name, column in walked().recent(4000).items()}
    ways = ways_to(rows["key"], rows["following"], torch.arange(200), reach=5.0)
    rooms = WORLD.room(rows["key"])
    across = ways.isfinite() & (rooms[:, None] == 1 - rooms)
    through = around(rows["key"][:, None], rows["key"])
    assert ((ways / through)[across] < 0.85).float().mean() > 0.2


def test_the_critic_knows_that_a_wall_is_in_the_way() -> None:
    torch.manual_seed(0)
    memory, generator = walked(), torch.Generator().manual_seed(1)
    critic, losses = train_critic(
        memory, CriticTraining(goals=100, steps=150, batch=512, lr=4e-3), generator
    )
    assert sum(losses[-20:]) < 0.05 * 20  # in units of the mean way
    (starts, goals), (near, there) = pairs(200, same=False), pairs(200, same=True)
    far = around(starts, goals)
    assert ((critic(starts, goals) - far).abs() / far).mean() < 0.2
    distance = (near - there).norm(dim=-1)
    assert ((critic(near, there) - distance).abs() / distance).mean() < 0.35
