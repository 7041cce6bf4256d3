"""Arithmetic of an estimate: what binds, error bars, hours and cost; and the named clusters."""

from __future__ import annotations

import dataclasses

import pytest

from helpers.pipelines.fake_training import change
from pipelines.capacity.clusters import CLUSTERS, find_cluster, this_machine
from pipelines.capacity.constants import (
    Constant,
    Constants,
    assumed,
    measured_rate,
    read_values,
    spread,
    with_measured,
)
from pipelines.capacity.estimate import DataSize, RunPlan, estimate
from pipelines.capacity.report import advice
from pipelines.capacity.step_cost import StepCost
from pipelines.config.train import PretrainConfig
from pipelines.recipes.images import debug, ijepa_vith14_in1k

COST = StepCost(
    trained=10**9,
    frozen=0,
    matrices=10**9,
    forward_flops=1e11,
    backward_flops=2e11,
    parts={"encoder": 1e11},
    kept_bytes=1e7,
    cast_bytes=0.0,
    block_bytes=1e8,
)
DATA = DataSize(samples=1_000_000, sample_bytes=1e5)
RUN = change(
    ijepa_vith14_in1k(),
    data={"batch_size": 1024, "lanes": 64},
    run={"steps": 1000, "workers": 16, "checkpoint_every": 100},
    optim={"warmup_steps": 0},
)
HOSTS = find_cluster(RUN, "p4d")


def sure(value: float) -> Constant:
    return Constant(value, value, value)


KNOWN = Constants(
    compute_flops=sure(1e14),
    update_bytes_s=sure(1e30),
    read_cpu_s=sure(1e-4),
    decode_cpu_s=sure(9e-4),
    vcpu_share=sure(1.0),
    read_bytes_s=sure(1e12),
    checkpoint_bytes_s=sure(1e9),
    upload_bytes_s=sure(1e9),
    link_bytes_s=sure(1e30),
    network_bytes_s=sure(1e30),
    standstill_share=sure(1e-12),
    activation_share=sure(1.0),
)


def planned(cfg: PretrainConfig = RUN, **constants: Constant) -> RunPlan:
    return estimate(cfg, HOSTS, COST, DATA, dataclasses.replace(KNOWN, **constants))


def test_device_hours_and_cost() -> None:
    plan = planned()
    # 64 images a worker x 3e11 FLOP / 1e14 FLOP/s
    assert plan.step_s.value == pytest.approx(0.192)
    assert plan.step_s.low == plan.step_s.value == plan.step_s.high
    assert plan.samples_per_s.value == pytest.approx(1024 / 0.192)
    assert plan.read_mb_s.value == pytest.approx(1024 / 0.192 * 0.1)
    # weights and two moments: 12 GB, on two hosts at 1 GB/s
    assert plan.checkpoint_bytes == 12e9
    assert plan.checkpoint_s.value == pytest.approx(6.0)
    assert plan.hours.value == pytest.approx((1000 * 0.192 + 10 * 6) / 3600)
    assert plan.dollars.value == pytest.approx(plan.hours.value * 2 * HOSTS.price)
    assert plan.epochs == pytest.approx(1.024)
    assert plan.decode_cores.value == pytest.approx(1024 * 1e-3 / 0.192)
    assert plan.binds == "device"


def test_what_binds_is_what_takes_longest() -> None:
    # 64 images x 40 ms on the 8 decode threads of a worker
    slow = planned(decode_cpu_s=sure(4e-2 - 1e-4))
    assert slow.step_s.value == pytest.approx(64 * 4e-2 / 8)
    assert slow.binds == "decode"
    far = planned(read_bytes_s=sure(1e8))  # 8 workers x 64 images x 100 kB
    assert far.step_s.value == pytest.approx(0.512)
    assert far.binds == "storage"
    # a ring between two hosts moves as much as the gradients hold: 4 GB, half of it overlapped
    network = planned(network_bytes_s=sure(1e9))
    assert network.step.exchange == pytest.approx(4.0 - 0.5 * 0.192)
    assert network.binds == "network"
    said = {plan.binds: advice(plan, RUN, HOSTS)[0] for plan in (slow, far, network)}
    assert len(set(said.values())) == len(said)


def test_training_and_data_share_the_cores_of_a_machine_without_gpu() -> None:
    cfg = change(debug(), data={"batch_size": 64, "lanes": 8}, run={"threads": 1})
    cluster = dataclasses.replace(this_machine(), vcpus=2, accelerator=None, accelerators=0)
    for decode, expected in ((1e-3, 64 * 3e-3), (5e-3, 64 * (3e-3 + 5e-3) / 2)):
        constants = dataclasses.replace(
            KNOWN, compute_flops=sure(1e14), read_cpu_s=sure(1e-12), decode_cpu_s=sure(decode)
        )
        plan = estimate(cfg, cluster, COST, DATA, constants)
        assert plan.step_s.value == pytest.approx(max(expected, 64 * decode / 2), rel=1e-6)
    still = dataclasses.replace(constants, standstill_share=sure(0.5))
    held = dataclasses.replace(still, decode_cpu_s=sure(1e-3))
    plan = estimate(cfg, cluster, COST, DATA, held)
    assert plan.step_s.value == pytest.approx(64 * (3e-3 + 0.5e-3))
    both = change(cfg, run={"threads": 2})
    plan = estimate(both, cluster, COST, DATA, constants)
    assert plan.step_s.value == pytest.approx(64 * (2 * 3e-3 + 5e-3) / 2)
    assert plan.binds == "cores"


def test_error_bars_add_up_in_quadrature() -> None:
    constants = dataclasses.replace(
        KNOWN, read_cpu_s=Constant(10, 7, 13), decode_cpu_s=Constant(20, 16, 24)
    )
    found = spread(lambda c: c.read_cpu_s.value + c.decode_cpu_s.value, constants)
    assert (found.value, found.low, found.high) == (30, 25, 35)
    falling = spread(lambda c: 100 / c.read_cpu_s.value, constants)
    assert falling.low < falling.value < falling.high


def test_memory_that_does_not_suffice_is_told_with_a_way_out() -> None:
    heavy = dataclasses.replace(COST, kept_bytes=1e9)
    plan = estimate(RUN, HOSTS, heavy, DATA, KNOWN)
    assert not plan.fits
    (line,) = [line for line in advice(plan, RUN, HOSTS) if line.startswith("Memory")]
    assert "--run.accumulate 4" in line
    assert estimate(change(RUN, run={"accumulate": 4}), HOSTS, heavy, DATA, KNOWN).fits
    large = dataclasses.replace(COST, trained=4 * 10**9, matrices=4 * 10**9)
    lines = advice(estimate(RUN, HOSTS, large, DATA, KNOWN), RUN, HOSTS)
    assert any("--run.parallel fsdp" in line for line in lines)
    for parallel in ("fsdp", "hsdp"):
        plan = estimate(change(RUN, run={"parallel": parallel}), HOSTS, large, DATA, KNOWN)
        assert plan.fits
        assert plan.memory.weights == 4 * 4e9 / {"fsdp": 16, "hsdp": 8}[parallel]


def test_sharding_costs_traffic() -> None:
    slow = dataclasses.replace(KNOWN, network_bytes_s=sure(1e9), link_bytes_s=sure(1e9))
    seconds = {
        parallel: estimate(
            change(RUN, run={"parallel": parallel}), HOSTS, COST, DATA, slow
        ).step.exchange
        for parallel in ("ddp", "fsdp", "hsdp")
    }
    inside, between, hidden = 8.0 * 7 / 8, 8.0 / 2, 0.5 * 0.192
    assert seconds["ddp"] == pytest.approx(inside + between - hidden)
    assert seconds["fsdp"] == pytest.approx(1.5 * (inside + between) - hidden)
    assert seconds["hsdp"] == pytest.approx(1.5 * inside + between - hidden)


def test_hosts_are_as_many_as_the_workers_need() -> None:
    assert (HOSTS.name, HOSTS.hosts, HOSTS.slots) == ("p4d.24xlarge", 2, 16)
    assert find_cluster(RUN, "g6.2xlarge").hosts == 16
    assert find_cluster(RUN, "p5", hosts=4, price=1.0).price == 1.0
    assert all(cluster.price > 0 and cluster.accelerators for cluster in CLUSTERS.values())
    on_cores = change(RUN, run={"gpu": False, "workers": 2})
    assert find_cluster(on_cores, "p4d").accelerator is None


@pytest.mark.parametrize(
    ("name", "hosts", "message"),
    [
        ("p9", None, r"--cluster: no 'p9'; one of this, g6"),
        ("g6", None, r"--cluster: no 'g6'"),  # two types of that family
        ("p4d", 1, r"--run\.workers: 16 do not fit the 8 GPUs of 1 .*--hosts 2"),
        ("p4d", 17, r"--hosts: 17 hosts are more than the 16"),
        ("this", None, r"--cluster this has no GPU.*--run\.no-gpu"),
    ],
)
def test_a_cluster_that_does_not_suit_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, hosts: int | None, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        find_cluster(RUN, name, hosts)


def test_a_rate_lies_between_its_bounds() -> None:
    found = measured_rate(100, [1.0, 2.0, 2.0, 2.0, 4.0], "here")
    assert found.low < found.value == 50 < found.high
    steady = measured_rate(100, [2.0] * 5, "here")
    assert steady.high / steady.low == pytest.approx(1.05**2)


def test_constants_come_back_as_they_were_kept() -> None:
    base = assumed(RUN, HOSTS, 1e5)
    values = KNOWN.to_json()
    assert with_measured(base, values, "--constants") == KNOWN
    some = with_measured(base, {"compute_flops": [3.0, 2.0, 4.0, "here"]}, "--constants")
    assert some.compute_flops == Constant(3.0, 2.0, 4.0, "here")
    assert some.decode_cpu_s == base.decode_cpu_s


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"constants": 3}', '{"constants": {"speed": [1, 1, 1, ""]}}',
     '{"constants": {"compute_flops": [1, 2, 3, ""]}}', '{"constants": {"compute_flops": [1]}}',
     '{"constants": {"compute_flops": [NaN, 1, 1, ""]}}'],
)  # fmt: skip
def test_a_file_that_holds_no_constants_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--constants: not constants that --save wrote"):
        with_measured(KNOWN, read_values(text, "--constants"), "--constants")
