"""Trains tiny runs by 1, 2 and 4 gloo processes, whole and sharded, into a folder.

`python tests/helpers/pipelines/sharded_runs.py FOLDER [every]` makes all of them; with `every`, a
run of each objective. A run's checkpoints are in FOLDER/<case>-<parallel>-<workers>.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.tensor.debug import CommDebugMode

from helpers.own_ray import python_path
from helpers.pipelines.fake_training import FolderStore, change, memory_batches, tiny_config
from helpers.repository import ROOT
from models.encoders.shape import PRESETS, Preset
from models.encoders.vit import VisionTransformer
from models.objectives import latent
from pipelines.config.train import PretrainConfig
from pipelines.runs.anchor import Anchored
from pipelines.training import recorder, state, trainer
from pipelines.training.contract import DataSource, Worker
from pipelines.training.parallel import shard_mesh
from pipelines.training.state import new_state

STEPS, HALF = 20, 10
NANO = Preset(width=48, depth=2, heads=2, predictor_width=24, predictor_depth=1, predictor_heads=1)
VIEWS = {"projector": (32, 16), "slices": 16}
# A weight without effect on the loss has a gradient of rounding noise, and Adam divides it by its
# size; with this epsilon the noise stays noise. I-JEPA and V-JEPA train with Adam's own.
STILL = {"eps": 1e-3}
CLIPS = {"frames": 4, "tubelet": 2}

CASES: dict[str, dict[str, Any]] = {
    "ijepa": {
        "objective": {"ema": (0.9, 1.0)},
        "optim": {"name": "hyper-adamw", "hyper_lr": 0.05, "clip_norm": 0.3},
    },
    "lejepa": {"objective": VIEWS, "optim": STILL},
    "vicreg": {"objective": VIEWS, "optim": {"name": "schedulefree", "eps": 1e-2}},
    "vjepa": {
        "model": {**CLIPS, "activation_checkpointing": True},
        "video_mask": {"blocks": (2, 1), "scale": (0.3, 0.5), "temporal_scale": (1, 1)},
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "mae": {"mask": {"context_keep": 6}},
    "dmjd": {"mask": {"context_keep": 6}},
    "levjepa": {"model": CLIPS, "objective": VIEWS, "optim": STILL},
    "videomae": {"model": CLIPS, "video_mask": {"kind": "tube"}},
    "regularized": {"objective": {"name": "ijepa", "regularize": "context_pooled", "slices": 16}},
    "anchored": {"objective": {"name": "ijepa"}},
    "bf16": {"objective": {"name": "ijepa"}, "run": {"precision": "bf16"}},
}


def config(folder: Path, case: str, parallel: str, workers: int, **run: Any) -> PretrainConfig:
    """The configuration of a run; `case` is an objective, and may end in `.<anything>`."""
    name = case.partition(".")[0]
    own = (CASES | OTHERS)[name]
    settings = {"steps": STEPS, "checkpoint_every": HALF, "log_every": HALF, "probe_every": STEPS}
    settings |= {"name": f"{case}-{parallel}-{workers}", "parallel": parallel}
    cfg = tiny_config(folder / "runs", **settings)
    run = {"workers": workers, **own.get("run", {}), **run}
    cfg = change(cfg, data={"lanes": 4}, run=run)
    objective = {"name": name, **own.get("objective", {})}
    model = {"encoder": "nano", **own.get("model", {})}
    masks = {part: own[part] for part in ("mask", "video_mask") if part in own}
    return change(cfg, objective=objective, model=model, optim=own.get("optim", {}), **masks)


def batches(cfg: PretrainConfig, **where: Any) -> Iterator[dict[str, Any]]:
    """Batches of images, or of clips whose frames differ."""
    for batch in memory_batches(cfg, **where):
        if cfg.modality == "video":
            images, count = batch.pop("images"), cfg.model.frames
            batch["clips"] = torch.stack([images.roll(8 * t, 3) for t in range(count)], dim=2)
        batch["sets"] = torch.ones(len(batch["sample_ids"]), dtype=torch.int64)
        yield batch


def anchored(objective: Any, cfg: PretrainConfig) -> Anchored:
    """Anchors to an encoder of other weights, as --anchor.checkpoint does."""
    frozen = VisionTransformer(objective.encoder.shape)
    return Anchored(objective, frozen, weight=0.5)


class SharedStore(FolderStore):
    """A folder into which every process writes its share."""

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        folder = self.folder / f"checkpoint_{metrics['step']:08d}"
        folder.mkdir(exist_ok=True)
        write(folder)
        if dist.is_initialized():
            dist.barrier()


def sum_of_weights(encoder: torch.nn.Module) -> float:
    """Stands for the online probe, which rank 0 runs alone."""
    return float(sum(p.double().abs().sum() for p in encoder.parameters()))


def run(folder: Path, case: str, parallel: str, rank: int, workers: int, **settings: Any) -> None:
    cfg = config(folder, case, parallel, workers, **settings)
    store = SharedStore(folder / cfg.run.name)
    worker = Worker(rank, workers, host=f"host {2 * rank // workers}")  # two, for hsdp
    recorder.build_probe = lambda cfg, say: sum_of_weights
    torch.manual_seed(rank)  # what the process's generator holds does not matter
    outcome = trainer.train(cfg, worker, DataSource(batches, 5, "hash"), store, lambda line: None)
    assert outcome.step == (cfg.run.stop_after or STEPS), outcome


def resume(folder: Path, source: str, case: str, parallel: str, rank: int, workers: int) -> None:
    """Goes on from the middle of another run."""
    name = f"{case}-{parallel}-{workers}"
    if rank == 0:
        half = f"checkpoint_{HALF:08d}"
        shutil.copytree(folder / source / half, folder / name / half)
    if workers > 1:
        dist.barrier()
    run(folder, case, parallel, rank, workers)


def communication_of_the_ema(folder: Path, rank: int, workers: int) -> int:
    """Counts the collectives of `after_step`."""
    cfg = config(folder, "ijepa.ema", "fsdp", workers)
    worker = Worker(rank, workers)
    built = new_state(cfg, worker.device, shard_mesh(cfg, worker))
    with CommDebugMode() as mode:
        built.objective.after_step(3, STEPS)
    return mode.get_total_counts()


def one(folder: Path) -> None:
    """What a single process trains."""
    for case in CASES:
        run(folder, case, "ddp", 0, 1)
    run(folder, "ijepa.alone", "fsdp", 0, 1)
    assert not dist.is_initialized()
    run(folder, "ijepa.parts", "ddp", 0, 1, accumulate=2)


def two(rank: int, folder: Path) -> None:
    with group(rank, 2, folder):
        for case in CASES:
            run(folder, case, "fsdp", rank, 2)
        resume(folder, "ijepa-fsdp-2", "ijepa.resumed", "fsdp", rank, 2)
        resume(folder, "ijepa-hsdp-4", "ijepa.other", "fsdp", rank, 2)
        resume(folder, "ijepa-hsdp-4", "ijepa.other", "ddp", rank, 2)
        resume(folder, "ijepa-ddp-1", "ijepa.whole", "fsdp", rank, 2)
        assert communication_of_the_ema(folder, rank, 2) == 0
        with replaced(latent, "update_target", lambda *args: None if rank else update(*args)):
            run(folder, "ijepa.bad_ema", "fsdp", rank, 2)
        with replaced(trainer, "total_norm", lambda gradients: norm_of_shards(gradients)):
            run(folder, "ijepa.bad_norm", "fsdp", rank, 2)


def four(rank: int, folder: Path) -> None:
    with group(rank, 4, folder):
        run(folder, "ijepa", "hsdp", rank, 4)
        run(folder, "ijepa.parts", "hsdp", rank, 4, accumulate=2)
        run(folder, "lejepa", "fsdp", rank, 4)


def every(rank: int, folder: Path) -> None:
    with group(rank, 4, folder):
        for case in CASES | OTHERS:
            anchor = anchored if case == "anchored" else state.anchored
            with replaced(state, "anchored", anchor):
                run(folder, f"{case}.every", "ddp", rank, 4)
                run(folder, f"{case}.every", "fsdp", rank, 4)


update = latent.update_target


def norm_of_shards(gradients: list[torch.Tensor]) -> torch.Tensor:
    """What the norm would be if nobody summed over the shards."""
    return torch.nn.utils.get_total_norm([gradient.to_local() for gradient in gradients])


class group:
    """The process group of one fork."""

    def __init__(self, rank: int, workers: int, folder: Path) -> None:
        torch.set_num_threads(1)
        place = f"file://{folder}/group{workers}"
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=workers)

    def __enter__(self) -> None:
        pass

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            dist.barrier()
            dist.destroy_process_group()


class replaced:
    """A context in which an attribute of a module is another one."""

    def __init__(self, module: Any, name: str, value: Any) -> None:
        self.module, self.name, self.value, self.old = module, name, value, getattr(module, name)

    def __enter__(self) -> None:
        setattr(self.module, self.name, self.value)

    def __exit__(self, *_: object) -> None:
        setattr(self.module, self.name, self.old)


def main(folder: Path, more: bool) -> None:
    """Imports torch once and then forks the processes, in a process without pytest's threads."""
    PRESETS["nano"] = NANO
    torch.set_num_threads(1)
    if more:
        torch.multiprocessing.start_processes(every, (folder,), 4, start_method="fork")
        return
    one(folder)
    torch.multiprocessing.start_processes(four, (folder,), 4, start_method="fork")
    torch.multiprocessing.start_processes(two, (folder,), 2, start_method="fork")
    resume(folder, "ijepa-hsdp-4", "ijepa.other", "ddp", 0, 1)


def make_runs(folder: Path, *arguments: str) -> None:
    """Runs this file in a process of its own."""
    paths = {"PYTHONPATH": python_path(ROOT, ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *arguments],
        env={**os.environ, **paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    main(Path(sys.argv[1]), "every" in sys.argv)
