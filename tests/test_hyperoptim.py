"""Hyperoptimizers against autograd through the update, torch's optimizers, and themselves in parts."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.distributed as dist
from hyper_reference import NAMES, Stacked, reference_step
from torch import nn

from models.hyperoptim import (
    HyperAdam,
    HyperAdamW,
    HyperRMSprop,
    HyperSGD,
    Tuner,
    sum_over,
)
from models.hyperoptim.adam import Adam
from models.hyperoptim.tuner import Level

BETAS = {"beta1": 0.8, "beta2": 0.95}
CASES = {
    "sgd": (HyperSGD, {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.02}),
    "sgd without momentum": (HyperSGD, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.02}),
    "rmsprop": (
        HyperRMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.02, "momentum": 0.6},
    ),
    "rmsprop without momentum": (
        HyperRMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.02, "momentum": 0.0},
    ),
    "adam": (HyperAdam, {"lr": 0.02, **BETAS, "eps": 1e-3, "weight_decay": 0.02}),
    "adamw": (HyperAdamW, {"lr": 0.02, **BETAS, "eps": 1e-3, "weight_decay": 0.05}),
}
TORCH = {
    HyperSGD: torch.optim.SGD,
    HyperRMSprop: torch.optim.RMSprop,
    HyperAdam: torch.optim.Adam,
    HyperAdamW: torch.optim.AdamW,
}
STEPS = 20


def all_of(case):
    """Every hyperparameter of a case that can move."""
    return tuple(name for name, base in CASES[case][1].items() if name != "momentum" or base)


def arguments(base):
    """A base as the optimizer's constructor takes it."""
    rest = {name: value for name, value in base.items() if not name.startswith("beta")}
    return rest | ({"betas": (base["beta1"], base["beta2"])} if "beta1" in base else {})


def stack_of(height, tune, **options):
    """Tuners that tune everything below: adam, above it rmsprop, above it sgd with momentum."""
    third = Tuner(rule="sgd", lr=1e-3, momentum=0.5, tune=NAMES["rmsprop"])
    second = Tuner(
        rule="rmsprop",
        lr=1e-3,
        alpha=0.8,
        momentum=0.3,
        weight_decay=0.01,
        eps=1e-6,
        tune=NAMES["adam"],
        above=third if height > 2 else None,
    )
    return Tuner(
        lr=0.02,
        betas=(0.7, 0.9),
        eps=1e-6,
        weight_decay=0.01,
        tune=tune,
        above=second if height > 1 else None,
        **options,
    )


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [[(6, 5), (5, 2)], [(5,), (2,)]]
    return [
        [torch.randn(shape, generator=generator, dtype=dtype) * 0.5 for shape in group]
        for group in shapes
    ]


def loss_at(step):
    """A batch's loss of a small network as a function of its four tensors."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 2, generator=generator, dtype=torch.float64)

    def loss(tensors):
        first, second, bias, shift = tensors
        hidden = torch.tanh(x.to(first.dtype) @ first + bias)
        return (hidden @ second + shift - y.to(first.dtype)).square().mean()

    return loss


def made(case, tuner, dtype=torch.float64, **options):
    """Parameters in two groups, of another rate and decay each, and their optimizer."""
    kind, base = CASES[case]
    params = [[nn.Parameter(w) for w in group] for group in weights(dtype)]
    other = {"lr": base["lr"] / 2, "weight_decay": base["weight_decay"] * 2}
    groups = [{"params": params[0]}, {"params": params[1], **other}]
    return [*params[0], *params[1]], kind(groups, **arguments(base), tuner=tuner, **options)


def take(params, optimizer, step):
    optimizer.zero_grad()
    loss = loss_at(step)(params)
    loss.backward()
    optimizer.step()
    return loss.item()


def recorded(monkeypatch):
    """What each level of a stack is given, step by step, from the lowest up."""
    seen, depth = [], [0]
    original = Level.step

    def step(self, by_theta, gate):
        if depth[0] == 0:
            seen.append([])
        seen[-1].append(by_theta.clone())
        depth[0] += 1
        original(self, by_theta, gate)
        depth[0] -= 1

    monkeypatch.setattr(Level, "step", step)
    return seen


def compare(case, height, monkeypatch, *, steps=STEPS, shared=False, capturable=None):
    tuner = stack_of(height, all_of(case), shared=shared)
    seen = recorded(monkeypatch)
    params, optimizer = made(case, tuner, capturable=capturable)
    base = CASES[case][1]
    other = {**base, "lr": base["lr"] / 2, "weight_decay": base["weight_decay"] * 2}
    rule = case.split()[0]
    stack = Stacked(rule, weights(), [base, other], tuner)
    for step in range(steps):
        before = len(seen)
        ours = take(params, optimizer, step)
        theirs, by_theta = reference_step(stack, loss_at(step))
        assert ours == pytest.approx(theirs, rel=1e-9)
        expected = [h for h in by_theta if h is not None]
        got = seen[before] if len(seen) > before else []
        if capturable:  # every level is called, the gate says whether it counts
            got = got[: len(expected)]
        assert len(got) == len(expected)
        # At k = 1 the betas' derivatives are exactly 0 and both sides round: hence the absolute part.
        for mine, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-13)
    moved = optimizer.hyper.theta_RH.abs()
    assert bool((moved > 1e-4).all())
    return optimizer


@pytest.mark.parametrize("height", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_hypergradients_of_every_hyperparameter_equal_autograd(case, height, monkeypatch):
    compare(case, height, monkeypatch)


@pytest.mark.parametrize("case", ["sgd", "rmsprop", "rmsprop without momentum", "adam", "adamw"])
def test_without_asking_the_device_too(case, monkeypatch):
    compare(case, 3, monkeypatch, capturable=True)


def test_groups_that_share_one_factor(monkeypatch):
    optimizer = compare("adamw", 2, monkeypatch, shared=True)
    assert optimizer.hyper.theta_RH.shape == (1, 5)
    first, second = (values["lr"] for values in optimizer.hyperparameters())
    assert first == pytest.approx(2 * second, rel=1e-12)


def test_a_hypergradient_of_the_wrong_sign_is_noticed(monkeypatch):
    right = Adam.hypergradients

    def wrong(self, *arguments):
        return {name: -value for name, value in right(self, *arguments).items()}

    monkeypatch.setattr(Adam, "hypergradients", wrong)
    with pytest.raises(AssertionError):
        compare("adamw", 1, monkeypatch)


def test_after_one_step_the_betas_of_adam_do_not_matter_yet(monkeypatch):
    """k = 1: mh = g and v / c2 = g^2 whatever the betas, so their derivatives are 0."""
    seen = recorded(monkeypatch)
    params, optimizer = made("adamw", stack_of(1, NAMES["adamw"]))
    take(params, optimizer, 0)
    assert seen == []  # no update yet to differentiate
    take(params, optimizer, 1)
    by_name = dict(zip(NAMES["adamw"], seen[0][0].T, strict=True))
    assert by_name["beta1"].abs().max() < 1e-15
    assert by_name["beta2"].abs().max() < 1e-15
    assert by_name["lr"].abs().min() > 1e-6


@pytest.mark.parametrize("tuned", [True, False], ids=["hyper-lr 0", "no tuner"])
@pytest.mark.parametrize("case", CASES)
def test_at_hyper_lr_0_it_is_torchs_optimizer_bit_for_bit(case, tuned):
    tuner = Tuner(lr=0.0, tune=all_of(case)) if tuned else None
    params, optimizer = made(case, tuner, torch.float32)
    kind, base = CASES[case]
    others = [nn.Parameter(w) for group in weights(torch.float32) for w in group]
    other = {"lr": base["lr"] / 2, "weight_decay": base["weight_decay"] * 2}
    fused = {"fused": True} if "adam" in case else {"foreach": True}
    torchs = TORCH[kind](
        [{"params": others[:2]}, {"params": others[2:], **other}], **arguments(base), **fused
    )
    for step in range(STEPS):
        take(params, optimizer, step)
        take(others, torchs, step)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("case", ["sgd", "rmsprop", "adam", "adamw"])
def test_lr_alone_needs_no_buffer_that_torchs_optimizer_does_not_have(case):
    params, optimizer = made(case, Tuner())
    take(params, optimizer, 0)
    kept = {name for state in optimizer.state.values() for name in state}
    assert kept <= {"exp_avg", "exp_avg_sq", "square_avg", "momentum_buffer"}


@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("case", ["sgd", "rmsprop", "adamw"])
def test_factors_stay_within_their_bounds(case, height):
    tuner = stack_of(height, all_of(case), bounds=(0.8, 1.1))
    tuner = Tuner(**{**vars(tuner), "lr": 0.5})
    params, optimizer = made(case, tuner)
    low, high = math.log(0.8), math.log(1.1)
    touched = False
    for step in range(10):
        take(params, optimizer, step)
        theta = optimizer.hyper.theta_RH
        assert bool((theta >= low).all() and (theta <= high).all())
        touched = touched or bool((optimizer.hyper.inside_RH == 0).any())
        for values in optimizer.hyperparameters():
            assert all(value > 0 for value in values.values())
            assert all(values[name] < 1 for name in ("beta1", "beta2", "alpha") if name in values)
    assert touched


def test_at_a_bound_the_levels_above_still_equal_autograd(monkeypatch):
    seen = recorded(monkeypatch)
    tuner = stack_of(2, ("lr",), bounds=(0.98, 1.02))
    params, optimizer = made("adamw", tuner)
    base = CASES["adamw"][1]
    other = {**base, "lr": base["lr"] / 2, "weight_decay": base["weight_decay"] * 2}
    stack = Stacked("adamw", weights(), [base, other], tuner)
    for step in range(10):
        take(params, optimizer, step)
        _, by_theta = reference_step(stack, loss_at(step))
        if step > 1:
            for mine, reference in zip(seen[-1], by_theta, strict=True):
                torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-13)
    assert bool((optimizer.hyper.inside_RH == 0).any())


def snapshot(params, optimizer):
    kept = [p.detach().clone() for p in params]
    kept += [t.clone() for state in optimizer.state.values() for t in state.values()]
    return kept + [t.clone() for n, t in optimizer.hyper_tensors().items() if n != "skipped"]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", [0, 5])
@pytest.mark.parametrize("case", ["sgd", "rmsprop", "adam", "adamw"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(case, bad, capturable):
    for tune in (("lr",), all_of(case)):
        runs = []
        for interrupted in (True, False):
            params, optimizer = made(case, stack_of(2, tune), capturable=capturable)
            for step in range(8):
                if interrupted and step == bad:
                    loss_at(99)(params).backward()
                    params[1].grad[0, 0] = math.nan if case == "adam" else math.inf
                    before = snapshot(params, optimizer) if step else None
                    optimizer.step()
                    after = snapshot(params, optimizer)
                    pairs = zip(before or after, after, strict=True)
                    assert all(torch.equal(a, b) for a, b in pairs)
                take(params, optimizer, step)
            assert int(optimizer.skipped) == int(interrupted)
            runs.append(snapshot(params, optimizer))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_from_its_state_is_the_same_run(case):
    tuner = stack_of(3, all_of(case))
    params, optimizer = made(case, tuner)
    for step in range(6):
        take(params, optimizer, step)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, resumed = made(case, tuner)
    for mine, theirs in zip(others, params, strict=True):
        mine.data.copy_(theirs)
    loaded = torch.load(file, weights_only=True)
    loaded["hyper"] = dict(sorted(loaded["hyper"].items()))  # names decide, not their order
    resumed.load_state_dict(loaded)
    for step in range(6, 12):
        take(params, optimizer, step)
        take(others, resumed, step)
    pairs = zip(snapshot(params, optimizer), snapshot(others, resumed), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    _, shorter = made(case, stack_of(2, all_of(case)))
    with pytest.raises(ValueError, match="another stack"):
        shorter.load_state_dict(optimizer.state_dict())


def test_a_schedule_keeps_its_shape_and_its_last_rate_is_what_is_differentiated(monkeypatch):
    """The rate of the next step is set before it; the derivative is by the rate that was used."""
    seen = recorded(monkeypatch)
    params, optimizer = made("adamw", stack_of(1, ("lr",)))
    base = CASES["adamw"][1]
    other = {**base, "weight_decay": base["weight_decay"] * 2}
    stack = Stacked("adamw", weights(), [dict(base), other], stack_of(1, ("lr",)))
    for step in range(8):
        rate = 0.02 * (step + 1) / 8
        for group, of_stack in zip(optimizer.param_groups, stack.bases, strict=True):
            group["lr"] = of_stack["lr"] = rate
        take(params, optimizer, step)
        _, by_theta = reference_step(stack, loss_at(step))
        if step:
            torch.testing.assert_close(seen[-1][0], by_theta[0], rtol=1e-6, atol=1e-13)
        for row, values in enumerate(optimizer.hyperparameters()):
            factor = float(optimizer.hyper.theta_RH[row, 0].exp())
            assert values["lr"] == pytest.approx(rate * factor, rel=1e-12)


def test_nothing_moves_while_tuning_is_off():
    params, optimizer = made("adamw", Tuner())
    optimizer.tuning = False
    for step in range(4):
        take(params, optimizer, step)
    assert bool((optimizer.hyper.theta_RH == 0).all())
    assert float(optimizer.level.steps) == 0
    optimizer.tuning = True
    take(params, optimizer, 4)
    assert bool((optimizer.hyper.theta_RH != 0).all())


def test_a_rate_far_too_low_is_found_out():
    losses = {}
    for tuned in (True, False):
        tuner = Tuner(lr=0.1, bounds=(1.0, 1e6)) if tuned else None
        params = [nn.Parameter(w) for group in weights() for w in group]
        optimizer = HyperAdam(params, lr=1e-6, tuner=tuner)
        losses[tuned] = [take(params, optimizer, step % 4) for step in range(120)][-1]
    assert losses[True] < 0.7 * losses[False]


def test_what_cannot_work_is_refused():
    weight = nn.Parameter(torch.ones(2))
    for message, build in {
        "not among": lambda: HyperSGD([weight], tuner=Tuner(tune=("beta1",))),
        "are 0": lambda: HyperSGD([weight], tuner=Tuner(tune=("momentum",))),
        "0 < low": lambda: HyperAdam([weight], tuner=Tuner(bounds=(0.0, 1.0))),
        "eps": lambda: HyperAdam([weight], eps=0.0),
        "beta2": lambda: HyperAdam([weight], betas=(0.9, 1.0)),
        "one dtype": lambda: HyperAdam([weight, nn.Parameter(torch.ones(2).double())]),
    }.items():
        with pytest.raises(ValueError, match=message):
            build()
    optimizer = HyperAdam([weight, nn.Parameter(torch.ones(1))])
    with pytest.raises(RuntimeError, match="all groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    weight.sum().backward()
    optimizer.step()  # the second has no gradient, and may have none later either
    optimizer.param_groups[0]["params"][1].grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="at every step or at none"):
        optimizer.step()


def _network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))


def _train(model, rank, world, **options):
    """Ten steps on this process's share of every batch; the hyperparameters of every step."""
    tuner = stack_of(2, NAMES["adamw"])
    optimizer = HyperAdamW(
        model.parameters(), lr=0.02, weight_decay=0.05, eps=1e-3, tuner=tuner, **options
    )
    used = []
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(8, size, generator=generator) for size in (6, 2))
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        used.append(list(optimizer.hyperparameters()[0].values()))
    return torch.tensor(used, dtype=torch.float64), optimizer


def _two_processes(rank, folder, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    replicated = nn.parallel.DistributedDataParallel(_network())
    by_ddp, _ = _train(replicated, rank, 2)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    sharded = fully_shard(_network(), mesh=mesh)
    refused = ""
    try:
        HyperAdamW(sharded.parameters())
    except ValueError as error:
        refused = str(error)
    by_fsdp, _ = _train(sharded, rank, 2, reduce=sum_over(mesh.get_group()))
    alone, _ = _train(fully_shard(_network(), mesh=mesh), rank, 2, reduce=lambda x: None)
    weight = [p.detach().numpy() for p in replicated.module.parameters()]
    queue.put((rank, by_ddp.numpy(), by_fsdp.numpy(), alone.numpy(), weight, refused))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_replicated_and_sharded(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = torch.multiprocessing.spawn(
        _two_processes, args=(str(tmp_path), queue), nprocs=2, join=False
    )
    results = sorted((queue.get() for _ in range(2)), key=lambda result: result[0])
    while not processes.join():
        pass
    one, _ = _train(_network(), 0, 1)
    (_, ddp, fsdp, alone, weight, refused), (_, ddp1, fsdp1, alone1, weight1, _) = results
    assert (ddp == ddp1).all()
    assert (fsdp == fsdp1).all()
    assert all((a == b).all() for a, b in zip(weight, weight1, strict=True))
    for found in (ddp, fsdp):
        torch.testing.assert_close(torch.from_numpy(found), one, rtol=2e-4, atol=0)
    assert "sum_over" in refused
    assert not (alone == alone1).all()  # without the reduction the ranks part
