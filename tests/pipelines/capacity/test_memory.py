"""Memory against hand counts, and sharding."""

from __future__ import annotations

import pytest

from helpers.pipelines.fake_training import change
from pipelines.capacity.memory import checkpoint_bytes, optimizer_bytes, worker_memory
from pipelines.capacity.step_cost import StepCost
from pipelines.recipes.images import debug

COST = StepCost(
    trained=1_000_000,
    frozen=600_000,
    matrices=990_000,
    forward_flops=1.0,
    backward_flops=2.0,
    parts={},
    kept_bytes=1000.0,
    cast_bytes=500.0,
    block_bytes=7000.0,
)
CFG = change(debug(), data={"batch_size": 64, "lanes": 8}, run={"workers": 4})


def test_memory_is_what_a_hand_count_says() -> None:
    memory = worker_memory(COST, CFG)
    assert memory.weights == memory.gradients == 4_000_000
    assert memory.optimizer == 8_000_000  # two moments, fp32
    assert memory.target == 2_400_000
    assert memory.activations == 16 * 1000  # 64 samples on 4 workers
    assert memory.casts == 500
    assert memory.gathered == memory.other == 0
    assert memory.total == 4e6 + 4e6 + 8e6 + 2.4e6 + 16_000 + 500


def test_micro_batches_keep_less_and_sharding_divides_the_rest() -> None:
    parts = worker_memory(COST, change(CFG, run={"accumulate": 4}))
    assert parts.activations == 4 * 1000
    whole, shared = worker_memory(COST, CFG), worker_memory(COST, CFG, shards=4)
    for name in ("weights", "gradients", "optimizer", "target"):
        assert getattr(shared, name) == getattr(whole, name) / 4
    assert shared.activations == whole.activations
    assert (shared.gathered, shared.casts) == (14_000, 0)
    half = worker_memory(COST, change(CFG, run={"precision": "bf16"}), shards=4)
    assert half.gathered == 7_000
    away = change(CFG, run={"gpu": True, "parallel": "fsdp", "cpu_offload": True})
    assert worker_memory(COST, away, shards=4).weights == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adamw", 8 * 10**6), ("muon", 4 * 990_000 + 8 * 10_000)],
)
def test_the_state_of_an_optimizer_is_found_by_taking_a_step(name: str, expected: int) -> None:
    cfg = change(CFG, optim={"name": name})
    assert optimizer_bytes(COST, cfg.optim) == expected
    assert checkpoint_bytes(COST, cfg) == 4 * 1_600_000 + expected


def test_a_gpu_holds_more_than_tensors() -> None:
    assert worker_memory(COST, change(CFG, run={"gpu": True})).other > 2**30
