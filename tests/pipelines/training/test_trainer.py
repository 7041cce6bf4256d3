"""The training loop in one process: resuming, accumulation, negative controls, refusals."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from helpers.pipelines.fake_training import (
    assert_bitwise,
    change,
    end_of,
    lines_of,
    memory_batches,
    run_training,
    tiny_config,
)
from pipelines.runs.checkpoints import load_tensors
from pipelines.training import loggers, recorder
from pipelines.training.contract import DataSource, Worker
from pipelines.training.loggers import StepTimer, progress_line
from pipelines.training.parallel import wrap
from pipelines.training.state import new_state

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[1, 2], ids=["plain", "accumulate"])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    cfg = tiny_config(folder, accumulate=request.param)
    outcome, _ = run_training(cfg, folder / "ck")
    assert outcome.step == 12
    return request.param, end_of(folder / "ck"), lines_of(cfg)


# Epochs end at 5 and 10, readings are at 5, 10 and 12, checkpoints at 4, 8 and 12.
@pytest.mark.parametrize("stop", [1, 4, 5, 7, 11])
def test_stop_anywhere_and_resume_is_bitwise_the_uninterrupted_run(uninterrupted, tmp_path, stop):
    accumulate, end, lines = uninterrupted
    cfg = tiny_config(tmp_path, accumulate=accumulate)
    stopped, _ = run_training(change(cfg, run={"stop_after": stop}), tmp_path / "ck")
    assert stopped.step == stop
    asked = []

    def watched(cfg, **where):
        asked.append((where["start_step"], where["end_step"]))
        yield from memory_batches(cfg, **where)

    torch.manual_seed(99)  # whatever the new process's generator holds
    _, said = run_training(cfg, tmp_path / "ck", DataSource(watched, 5, "memory-hash"))
    assert asked == [(stop, 12)]
    assert f"at step {stop}" in said[0]
    assert_bitwise(end_of(tmp_path / "ck"), end)
    assert lines_of(cfg) == lines


OBJECTIVES = {
    "lejepa": {},
    "vicreg": {},
    "mae": {},
    "dmjd": {},
    "ijepa": {"regularize": "context_pooled"},
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_trains_and_resumes_bitwise(tmp_path, name):
    """Views, slices and all counters must come back with the checkpoint."""

    def run(folder, *stops):
        cfg = tiny_config(tmp_path / folder, steps=4, log_every=2, checkpoint_every=4)
        small = {"name": name, "projector": (32, 16), "slices": 16, **OBJECTIVES[name]}
        cfg = change(cfg, objective=small, mask={"context_keep": None if name == "ijepa" else 6})
        for stop in stops:
            outcome, _ = run_training(
                change(cfg, run={"stop_after": stop}), tmp_path / folder / "ck"
            )
            assert (outcome.step, outcome.collapsed) == (stop, None)
        return end_of(tmp_path / folder / "ck", 4), lines_of(cfg)

    whole, resumed = run("whole", 4), run("resumed", 1, 4)
    assert_bitwise(resumed[0], whole[0])
    assert resumed[1] == whole[1]
    readings = whole[1][-1]
    assert readings["loss"] > 0
    extra = {"lejepa": "sigreg", "vicreg": "covariance", "ijepa": "regularizer"}.get(name, "rankme")
    assert readings[extra] > 0


def test_a_crash_after_the_checkpoint_redoes_the_lost_steps_and_their_metrics(
    uninterrupted, tmp_path
):
    accumulate, end, lines = uninterrupted
    cfg = tiny_config(tmp_path, accumulate=accumulate)

    def crashing(cfg, **where):
        for batch in memory_batches(cfg, **where):
            if batch["step"] == 11:
                raise OSError("host lost")
            yield batch

    with pytest.raises(OSError, match="host lost"):
        run_training(cfg, tmp_path / "ck", DataSource(crashing, 5, "memory-hash"))
    assert [row["step"] for row in lines_of(cfg)] == [5, 10]
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 11, "lo')  # killed while writing
    run_training(cfg, tmp_path / "ck")  # from step 8
    assert_bitwise(end_of(tmp_path / "ck"), end)
    assert lines_of(cfg) == lines


def test_a_crash_before_the_first_checkpoint_leaves_one_reading_of_step_0(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "build_probe", lambda cfg, say: lambda objective: 0.25)
    cfg = tiny_config(tmp_path, probe_every=12)

    def crashing(cfg, **where):
        yield from itertools.islice(memory_batches(cfg, **where), 2)
        raise OSError("host lost")

    with pytest.raises(OSError, match="host lost"):
        run_training(cfg, tmp_path / "ck", DataSource(crashing, 5, "memory-hash"))
    assert [row["step"] for row in lines_of(cfg)] == [0]
    run_training(cfg, tmp_path / "ck")
    assert [row["step"] for row in lines_of(cfg) if "knn" in row] == [0, 12]
    run_training(change(cfg, run={"stop_after": 12}), tmp_path / "ck")  # a resume keeps it
    assert [row["step"] for row in lines_of(cfg) if "knn" in row] == [0, 12]


def test_no_buffer_travels_between_processes_at_a_step(tmp_path):
    """A group of one process; the objective has buffers, which DDP broadcasts by default."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        cfg = tiny_config(tmp_path)
        state = new_state(cfg, CPU)
        assert list(state.objective.buffers())
        model = wrap(state.objective, cfg, Worker(world_size=2))
        assert not model.will_sync_module_buffers()
        plain = torch.nn.parallel.DistributedDataParallel(state.objective)
        assert plain.will_sync_module_buffers()  # what the assertion above would miss
    finally:
        torch.distributed.destroy_process_group()


def test_resuming_without_the_position_would_be_noticed(uninterrupted, tmp_path):
    """Negative control: the comparison fails if the loader restarts the epoch on resume."""
    accumulate, end, _ = uninterrupted
    cfg = tiny_config(tmp_path, accumulate=accumulate)
    run_training(change(cfg, run={"stop_after": 7}), tmp_path / "ck")

    def forgetful(cfg, *, start_step, end_step, **ranks):
        begin = start_step - start_step % 5
        count = end_step - start_step
        yield from memory_batches(cfg, start_step=begin, end_step=begin + count, **ranks)

    run_training(cfg, tmp_path / "ck", DataSource(forgetful, 5, "memory-hash"))
    with pytest.raises(AssertionError):
        assert_bitwise(end_of(tmp_path / "ck"), end)


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    ends = {}
    for accumulate in (1, 4):
        cfg = tiny_config(tmp_path / str(accumulate), accumulate=accumulate, log_every=1)
        run_training(cfg, tmp_path / str(accumulate) / "ck")
        ends[accumulate] = [row["loss"] for row in lines_of(cfg)]
    assert ends[1] == pytest.approx(ends[4], abs=1e-5)


def test_training_changes_the_weights_and_frozen_does_not(tmp_path):
    cfg = tiny_config(tmp_path)
    fresh = new_state(cfg, CPU).objective.state_dict()
    run_training(cfg, tmp_path / "ck")
    trained = end_of(tmp_path / "ck")[0]["model"]
    moved = [name for name in fresh if not torch.equal(fresh[name], trained[name])]
    assert any(name.startswith("encoder.") for name in moved)
    assert any(name.startswith("target_encoder.") for name in moved)

    frozen = change(
        cfg,
        optim={"lr": 0.0, "start_lr": 0.0, "final_lr": 0.0},
        run={"name": "frozen"},
    )
    run_training(frozen, tmp_path / "frozen-ck")
    kept = end_of(tmp_path / "frozen-ck")[0]["model"]
    assert all(torch.equal(fresh[name], kept[name]) for name in fresh)


def test_weights_follow_from_the_seed_alone(tmp_path):
    one, same, other = (
        new_state(tiny_config(tmp_path, seed=s), CPU).objective.state_dict() for s in (3, 3, 4)
    )
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(
        one["encoder.patch_embed.proj.weight"], other["encoder.patch_embed.proj.weight"]
    )


def test_bf16_autocast_keeps_fp32_weights_and_learns_about_the_same(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        cfg = tiny_config(tmp_path / precision, precision=precision)
        outcome, _ = run_training(cfg, tmp_path / precision / "ck")
        losses[precision] = outcome.metrics["loss"]
    tensors = end_of(tmp_path / "bf16" / "ck")[0]
    floating = [t for g in ("model", "optimizer") for t in tensors[g].values() if t.ndim]
    assert all(t.dtype == torch.float32 for t in floating)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]  # it did run in bf16


def test_clipping_bounds_the_update_and_logs_the_norm_before(tmp_path):
    cfg = change(tiny_config(tmp_path), optim={"clip_norm": 1e-3, "warmup_steps": 0})
    clipped = change(cfg, run={"steps": 1})
    outcome, _ = run_training(clipped, tmp_path / "ck")
    assert outcome.metrics["grad_norm"] > 1e-2
    moments = [
        t for n, t in end_of(tmp_path / "ck", 1)[0]["optimizer"].items() if n.endswith("exp_avg")
    ]
    # exp_avg after one step is 0.1 of the gradient as clipped.
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in moments)) * 10
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_own_checkpoint_then_init_from_then_scratch(tmp_path):
    donor = tiny_config(tmp_path / "donor", seed=5)
    run_training(donor, tmp_path / "donor" / "ck")
    donor_end = tmp_path / "donor" / "ck" / "checkpoint_00000012"
    cfg = tiny_config(tmp_path, init_from=str(donor_end), steps=12, stop_after=4)
    frozen = change(cfg, optim={"lr": 0.0, "start_lr": 0.0, "final_lr": 0.0})

    outcome, said = run_training(frozen, tmp_path / "ck")
    assert outcome.step == 4
    assert str(donor_end) in said[0]
    theirs = load_tensors(donor_end, "model", 1)
    ours = load_tensors(tmp_path / "ck" / "checkpoint_00000004", "model", 1)
    assert torch.equal(ours["encoder.norm.bias"], theirs["encoder.norm.bias"])

    shutil.rmtree(donor_end)  # its own checkpoint comes first: the donor is not even looked at
    outcome, said = run_training(change(frozen, run={"stop_after": 8}), tmp_path / "ck")
    assert (outcome.step, outcome.refused) == (8, None)
    assert "resuming" in said[0]


def test_settings_refused_by_the_objective_end_the_run_at_once(tmp_path):
    # Raised, Ray Train would start the workers again, three times.
    cfg = tiny_config(tmp_path)
    changed = change(cfg, objective={"regularize": "target_pooled"})
    outcome, _ = run_training(changed, tmp_path / "ck")
    assert "--objective.regularize" in outcome.refused
    assert (outcome.step, outcome.metrics) == (0, {})


def test_an_unusable_checkpoint_stops_the_run_instead_of_starting_over(tmp_path):
    cfg = tiny_config(tmp_path, stop_after=4)
    run_training(cfg, tmp_path / "ck")
    refused, _ = run_training(change(cfg, optim={"lr": 0.5}), tmp_path / "ck")
    assert "--optim.lr" in refused.refused
    share = next((tmp_path / "ck").glob("*/optimizer-*"))
    share.write_bytes(share.read_bytes()[:1000])
    refused, _ = run_training(cfg, tmp_path / "ck")
    assert str(share) in refused.refused
    absent, _ = run_training(
        tiny_config(tmp_path, init_from=str(tmp_path / "no")), tmp_path / "other"
    )
    assert "neither a checkpoint nor a run" in absent.refused
    assert not list((tmp_path / "other").iterdir())  # nothing was trained


def test_a_finished_run_is_left_alone(tmp_path):
    cfg = tiny_config(tmp_path)
    run_training(cfg, tmp_path / "ck")
    lines, end = lines_of(cfg), end_of(tmp_path / "ck")
    outcome, _ = run_training(cfg, tmp_path / "ck")
    assert outcome.step == 12
    assert lines_of(cfg) == lines
    assert_bitwise(end_of(tmp_path / "ck"), end)


def test_a_loader_that_ends_early_or_gives_a_wrong_batch_is_an_error(tmp_path):
    def short(cfg, **where):
        yield from list(memory_batches(cfg, **where))[:-1]

    def thin(cfg, **where):
        for batch in memory_batches(cfg, **where):
            yield {**batch, "images": batch["images"][:-1]}

    cfg = tiny_config(tmp_path, steps=3, checkpoint_every=100)
    with pytest.raises(RuntimeError, match="ended at step 2 of 3"):
        run_training(cfg, tmp_path / "a", DataSource(short, 5, "memory-hash"))
    with pytest.raises(ValueError, match="7 images a worker, not 8"):
        run_training(cfg, tmp_path / "b", DataSource(thin, 5, "memory-hash"))


def test_sample_log_writes_every_step_of_every_attempt(tmp_path):
    cfg = tiny_config(tmp_path, log_samples=True)
    run_training(change(cfg, run={"stop_after": 3}), tmp_path / "ck")
    run_training(cfg, tmp_path / "ck")
    rows = [
        json.loads(line)
        for path in sorted((tmp_path / "run").glob("samples-rank0-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert len({row["attempt"] for row in rows}) == 2
    first_epoch = [i for row in rows[:5] for i in row["ids"]]
    assert sorted(first_epoch) == [i.to_bytes(16, "big").hex() for i in range(40)]


def test_probe_without_labels_is_skipped_with_a_line(tmp_path):
    outcome, said = run_training(tiny_config(tmp_path, probe_every=4), tmp_path / "ck")
    assert "no online kNN" in said[0]
    assert "knn" not in outcome.metrics


def test_step_time_is_split_into_phases_and_time_between_steps_is_not_counted(monkeypatch):
    now = [7.0]
    monkeypatch.setattr(loggers, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    timer = StepTimer(CPU)
    for _ in range(3):
        now[0] += 100
        timer.start()
        for phase, seconds in (("data", 1), ("forward", 2), ("backward", 8), ("optimizer", 4)):
            now[0] += seconds
            timer.mark(phase)
    assert timer.totals() == {"data": 3, "forward": 6, "backward": 24, "optimizer": 12}
    assert sum(timer.totals().values()) == 0


def test_progress_line_reads_as_documented():
    values = {"loss": 0.3121, "rankme": 45.12, "knn": 0.312, "samples_per_s": 812.4}
    line = progress_line(120, 500, {**values, "data_wait_share": 0.03}, 100.0)
    assert line == "step 120/500 loss 0.3121 rankme 45.1 knn 31.2% 812 img/s wait 3% eta 0:01:40"
    assert progress_line(1, 2, {}, math.nan) == "step 1/2"


@pytest.mark.slow
def test_compiled_objective_has_the_same_losses_and_checkpoint_names(tmp_path):
    losses = {}
    for compiled in (False, True):
        cfg = tiny_config(tmp_path / str(compiled), compile=compiled, log_every=1, steps=4)
        run_training(cfg, tmp_path / str(compiled) / "ck")
        losses[compiled] = [row["loss"] for row in lines_of(cfg)]
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
    names = {c: set(end_of(tmp_path / str(c) / "ck", 4)[0]["model"]) for c in (False, True)}
    assert names[True] == names[False]
