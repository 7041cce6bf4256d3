"""Everything done between optimizer steps: metrics, collapse watch, probes and checkpoints."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipelines.config.as_json import to_json
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_format import CheckpointState, report_of, save_share, share_of
from pipelines.runs.run_folder import RunFolder
from pipelines.runtime.uris import join_uri
from pipelines.training.contract import (
    CheckpointStore,
    DataSource,
    Lost,
    Say,
    StopReason,
    Worker,
    end_step,
)
from pipelines.training.loggers import MetricsLog, SampleLog, StepTimer, progress_line, speed
from pipelines.training.optimizers import averaged, read_hyperparameters
from pipelines.training.parallel import whole_encoder
from pipelines.training.probes.online_probe import OnlineProbe, build_probe
from pipelines.training.probes.rank_probe import RankProbe
from pipelines.training.state import TrainState
from pipelines.worker_group.stragglers import Hunger, Pace, Stragglers

ASK_ENV = "RAYJEPA_ASK_EVERY_S"
"""Seconds between two questions whether a group should stop, about; tests shorten them."""
ASK_S = 10.0
RETRY_S = 60.0
"""Pause before the last checkpoint of a run is tried again, if there was no room for it."""


def _not_finite(loss: float, step: int) -> str | None:
    if math.isfinite(loss):
        return None
    return (
        f"the loss is {loss} at step {step}. Try a lower --optim.lr, a longer "
        "--optim.warmup-steps, --optim.clip-norm 1 or --run.precision fp32."
    )


class Recorder:
    """Reads and logs metrics, watches for collapse, runs the probes and saves checkpoints.

    Args:
        cfg: The run.
        worker: This process.
        state: The state that is trained.
        data: The data source, for the epoch and the identity of the shards.
        store: Where checkpoints are saved.
        say: Takes lines for the user.
        lost: Says who has taken the run over, and is asked before anything is written; None if that
            cannot happen.
        stop_reason: Says why this group should stop; None if nobody asks it to.
    """

    def __init__(
        self,
        cfg: PretrainConfig,
        worker: Worker,
        state: TrainState,
        data: DataSource,
        store: CheckpointStore,
        say: Say,
        lost: Lost | None = None,
        stop_reason: StopReason | None = None,
    ) -> None:
        self.cfg, self.worker, self.state = cfg, worker, state
        self.data, self.store, self.say = data, store, say
        self.timer = StepTimer(worker.device)
        self._stragglers, self._hunger = Stragglers(), Hunger()
        self._read_step, self._read_time = state.step, time.perf_counter()
        self._folder = RunFolder(join_uri(cfg.run.storage, cfg.run.name))
        self._told = False
        self._lost = lost
        self.taken_over: str | None = None
        """Who has taken the run over; then nothing is written any more."""
        self._stop_reason = stop_reason
        self._asked_step, self._asked_time = state.step, time.perf_counter()
        self._ask_step = state.step + 1
        self.stopped: str | None = None
        """Why the group stops after this step, of which there is a checkpoint."""
        self._log: MetricsLog | None = None
        self._probe: OnlineProbe | None = None
        self._rank_probe: RankProbe | None = None
        self._samples = self._sample_log() if cfg.run.log_samples else None
        if worker.rank == 0:
            (self._folder.local / "config.json").write_text(to_json(cfg))
            self._log = MetricsLog(self._folder, state.step)
            self._probe = build_probe(cfg, say)
            self._rank_probe = RankProbe(cfg) if cfg.run.rank_every else None
        values = self._probed(knn=bool(cfg.run.probe_every)) if state.step == 0 else {}
        if self._log is not None and values:
            self._log.write(0, values)

    def reads_at(self, step: int) -> bool:
        """Whether metrics are read after `step`: every `log_every` steps, and after the last."""
        return step % self.cfg.run.log_every == 0 or step == self.cfg.run.steps

    def after_step(
        self, batch: dict[str, Any], schedule: dict[str, float], grad_norm: Tensor | None
    ) -> str | None:
        """Does what is due after the step just taken.

        Args:
            batch: The batch of the step.
            schedule: Learning rate and weight decay of the step, logged under these names.
            grad_norm: Norm of the gradient before clipping; None if it was not computed.

        Returns:
            Why the run must stop, or None.
        """
        run, step = self.cfg.run, self.state.step
        reason = self._asked_to_stop()
        if self._is_taken_over(writes=reason is not None):
            return None
        collapsed = None
        values: dict[str, Any] = {}
        if self._samples:
            self._samples.write(step, batch["sample_ids"])
        if self.reads_at(step):
            values, collapsed = self._read(schedule, grad_norm)
        stop = collapsed is not None and self.cfg.watch.action == "stop"
        if not stop:
            values |= self._probed(knn=self._due(run.probe_every), ranks=self._due(run.rank_every))
        if values:
            self._write(values)
        if stop:
            return collapsed
        if reason or step % run.checkpoint_every == 0 or step == end_step(self.cfg):
            self._checkpoint(values)
        if reason:
            self.say(f"stopping after step {step}: {reason}")
            self.stopped = reason
        return None

    def _asked_to_stop(self) -> str | None:
        """Asks every ten seconds or so; all processes ask at the same steps and get one answer."""
        step = self.state.step
        if self._stop_reason is None or step < self._ask_step or step == end_step(self.cfg):
            return None
        now, mine = time.perf_counter(), self._stop_reason()
        seconds = (now - self._asked_time) / (step - self._asked_step)
        self._asked_step, self._asked_time = step, now
        every = float(os.environ.get(ASK_ENV, ASK_S))
        answer = (mine, step + max(1, math.ceil(every / max(seconds, 1e-4))))
        reason, self._ask_step = self.worker.all(answer)[0]
        return reason

    def _is_taken_over(self, *, writes: bool) -> bool:
        """Asks where something is going to be written; all processes get the same answer."""
        if self._lost is None:
            return False
        run, step = self.cfg.run, self.state.step
        every = (run.log_every, run.checkpoint_every, run.probe_every, run.rank_every)
        writes |= step == end_step(self.cfg) or any(self._due(steps) for steps in every)
        if writes:
            self.taken_over = self.worker.first(self._lost() if self.worker.rank == 0 else None)
        return self.taken_over is not None

    def _due(self, every: int) -> bool:
        step = self.state.step
        return bool(every) and (step % every == 0 or step == self.cfg.run.steps)

    def _read(
        self, schedule: dict[str, float], grad_norm: Tensor | None
    ) -> tuple[dict[str, Any], str | None]:
        state, cfg = self.state, self.cfg
        values: dict[str, Any] = {"epoch": self._epoch(), **state.meter.reading(), **schedule}
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        readings = {name: watch.reading() for name, watch in state.watches.items()}
        for reading in readings.values():
            values |= reading
        values |= read_hyperparameters(state.optimizer)
        self._say_skipped(values.get("skipped_steps", 0.0))
        verdict = None
        if cfg.watch.action != "off":
            verdict = _not_finite(values["loss"], state.step)
            found = [w.judge(readings[name], state.step) for name, w in state.watches.items()]
            verdict = verdict or next((line for line in found if line), None)
        phases = self.timer.totals()
        # All processes have the same sums, but their eigenvalues may differ in the last bit.
        told = self.worker.all((verdict, self._pace(phases)))
        verdict = next((line for line, _ in told if line), None)
        slow, line = self._stragglers.read([pace for _, pace in told])
        values |= slow
        if line:
            self.say(line)
        if verdict:
            values["collapsed"] = True
            self.say(f"WARNING: {verdict}" if cfg.watch.action == "warn" else verdict)
        samples = (state.step - self._read_step) * cfg.data.batch_size
        values |= speed(phases, samples, self.worker.device)
        if self.worker.rank == 0:
            line = self._hunger.read(values["data_wait_share"], self.data.crowd)
            if line:
                self.say(line)
        return values, verdict

    def _pace(self, phases: dict[str, float]) -> Pace:
        steps = max(1, self.state.step - self._read_step)
        return Pace(
            host=self.worker.host,
            data_s=phases["data"] / steps,
            forward_s=phases["forward"] / steps,
            step_s=sum(phases.values()) / steps,
        )

    def _say_skipped(self, count: float) -> None:
        new = count - self.state.metrics.get("skipped_steps", 0.0)
        if new:
            self.say(f"WARNING: {new:.0f} steps skipped: the gradient was not finite")

    def _probed(self, *, knn: bool, ranks: bool = False) -> dict[str, Any]:
        """Runs the probes that are due, on rank 0, with the weights of all processes."""
        if not (knn or ranks):
            return {}
        values: dict[str, Any] = {}
        with averaged(self.state.optimizer):
            encoder = whole_encoder(self.state.objective.feature_encoder, self.worker)
            if encoder is not None and knn and self._probe:
                values["knn"] = self._probe(encoder)
            if encoder is not None and ranks and self._rank_probe:
                values |= self._rank_probe(encoder)
        return values

    def _epoch(self) -> float:
        return self.state.step / self.data.steps_per_epoch

    def _write(self, values: dict[str, Any]) -> None:
        step, now = self.state.step, time.perf_counter()
        self.state.metrics |= {k: v for k, v in values.items() if isinstance(v, float)}
        if self._log is not None:
            self._log.write(step, values)
        if "loss" in values:
            seconds = (now - self._read_time) / (step - self._read_step)
            left = seconds * (self.cfg.run.steps - step)
            self.say(progress_line(step, self.cfg.run.steps, self.state.metrics, left))
            self._read_step, self._read_time = step, now

    def _checkpoint(self, values: dict[str, Any]) -> None:
        state, cfg, worker = self.state, self.cfg, self.worker
        saved = CheckpointState(
            step=state.step,
            position=state.step * cfg.data.batch_size,
            epoch=self._epoch(),
            manifest_hash=self.data.manifest_hash,
            metrics=dict(state.metrics),
            strikes={name: watch.strikes for name, watch in state.watches.items()},
            world_size=worker.world_size,
        )

        share = share_of(state.tensors(), worker.rank, worker.world_size)

        def write(folder: Path) -> None:
            save_share(folder, share, saved, cfg, rank=worker.rank)

        report = report_of(state.step, values)
        while problem := self.store.save(write, report):
            self.say(f"WARNING: no checkpoint of step {state.step}: {problem}")
            if state.step != end_step(cfg):
                break
            time.sleep(RETRY_S)
        self._sync()

    def _sync(self, *, last: bool = False) -> None:
        if self._log is not None and not last:
            self._log.flush()
        if self.worker.rank != 0 and not self._samples:
            return
        problem = self._folder.sync(patient=last)
        if problem and (last or not self._told):
            then = "the newest are lost" if last else "it is tried again at every checkpoint"
            self.say(f"WARNING: metrics do not reach {self._folder.uri} ({problem}); {then}")
        self._told = bool(problem)

    def _sample_log(self) -> SampleLog:
        attempt = [int(time.time() * 1000)]
        if self.worker.world_size > 1:
            dist.broadcast_object_list(attempt)
        return SampleLog(self._folder, self.worker.rank, attempt[0])

    def __enter__(self) -> Recorder:
        """Returns itself."""
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Closes the logs; uploads what has changed since the last checkpoint, unless it failed."""
        if self._log is not None:
            self._log.close()
        if self.taken_over is None and failure is None:
            self._sync(last=True)
        self._folder.close()
