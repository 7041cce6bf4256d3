"""Cost, critic and the loop of the agent, on the true simulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.planning.actors.actor import Actor, Search
from models.planning.agent import Agent, ShuffledModel, build_agent
from models.planning.configurator import TaskSpec, configure
from models.planning.costs.critic import CriticTraining, train_critic, ways_to
from models.planning.costs.intrinsic import (
    Future,
    Hazard,
    IntrinsicCost,
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
    both = IntrinsicCost(terms=((2.0, effort), (0.5, uncertainty)))
    torch.testing.assert_close(both(future()), 2 * effort(future()) + 0.5 * uncertainty(future()))


def run(agent: Agent, starts: Tensor, goals: Tensor, steps: int) -> Tensor:
    agent.begin(goals)
    places, reached = starts, WORLD.reached(starts, goals)
    for _ in range(steps):
        (rows,) = (~reached).nonzero(as_tuple=True)
        if not len(rows):
            break
        places = places.clone()
        places[rows] = WORLD.step(places[rows], agent.plan(places[rows], rows)[:, 0])
        reached = reached | WORLD.reached(places, goals)
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


def test_memory_holds_every_step_and_its_surprise() -> None:
    starts, goals = pairs(4, same=True)
    memory = Memory(1000)
    run(agent(TrueModel(world=WORLD), memory=memory), starts, goals, 3)
    rows = memory.recent(99)
    assert len(rows["key"]) == 12
    surprise = rows["surprise"].view(3, 4)  # the newest first
    assert surprise[2].isnan().all()
    assert surprise[:2].abs().max() < 1e-4  # the true model is never surprised
    torch.testing.assert_close(
        WORLD.step(rows["key"], rows["action"]), rows["expected"], msg="what it expected"
    )


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
        assert run(made, starts, goals, 40).all()
        rows = made.memory.recent(999)["key"]
        inside = (rows[:, 0] > 6) & (rows[:, 0] < 10) & (rows[:, 1] > 14) & (rows[:, 1] < 18)
        deepest[zones] = int(inside.sum())
    assert deepest[()] > 6
    assert deepest[zone,] < 0.2 * deepest[()]


def test_the_budget_decides_how_many_plans_are_tried() -> None:
    small, large = (configure(TaskSpec(budget=budget)).search for budget in (960, 9600))
    assert (small.samples, large.samples) == (20, 200)
    assert (small.elites, large.elites) == (2, 20)
    assert configure(TaskSpec(steps=5)).search.horizon == 5
    with pytest.raises(ValueError, match=r"--budget: needs at least 96 imagined steps, got 50"):
        configure(TaskSpec(budget=50))


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
