"""Estimate a pretraining run: step time, data, memory, checkpoints, hours and cost.

    python -m pipelines.plan_run ijepa_vith14_in1k --cluster p4d
    python -m pipelines.plan_run cifar10_demo --data.train SHARDS --measure

Nothing is trained and no Ray is started. FLOPs, parameters and activations are counted on the real
networks without memory; speeds are constants, which --measure replaces by what it measures on this
machine. Every estimate has error bars. docs/scaling.md says how it is done and where it ends.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Any

if __name__ == "__main__" and not __package__:  # `python pipelines/plan_run.py`, uninstalled
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import tyro
from rich.console import Console

from pipelines.capacity.clusters import Cluster, find_cluster
from pipelines.capacity.constants import Constants, assumed, read_values, with_measured
from pipelines.capacity.estimate import DataSize, RunPlan, estimate
from pipelines.capacity.report import advice, as_json, table
from pipelines.capacity.step_cost import count_step, countable
from pipelines.config.jobs import PlanRunConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import AnchorConfig, PretrainConfig
from pipelines.recipes.registry import RECIPES
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import open_uri, write_atomic

IMAGES, IMAGE_BYTES, SEGMENT_BYTES = 1_281_167, 110_000.0, 500_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan and what it stands on."""

    cfg: PretrainConfig
    cluster: Cluster
    data: DataSize
    constants: Constants
    plan: RunPlan
    notes: list[str]
    """What was not counted or measured, and why."""


def plan_run(cfg: PlanRunConfig, run: PretrainConfig) -> Planned:
    """Estimates a run.

    Args:
        cfg: what it is planned for.
        run: the run.

    Raises:
        ValueError: a flag is invalid; the message names it.
    """
    cfg = prepare(cfg)
    run = prepare(_completed(run), write=False)
    cluster = find_cluster(run, cfg.cluster, cfg.hosts, cfg.price)
    data = data_size(cfg, run)
    constants = assumed(run, cluster, data.sample_bytes)
    if cfg.constants:
        values = read_values(_read(cfg.constants), "--constants")
        constants = with_measured(constants, values, "--constants")
    cost = count_step(run)
    notes: list[str] = []
    if countable(run) != run:
        notes.append("FLOPs and memory: counted as if --model.exclude left nothing out of views")
    if cfg.measure:
        from pipelines.capacity.measure import measure

        found, unmeasured = measure(run, cluster, cost, constants)
        notes += unmeasured
        constants = dataclasses.replace(constants, **found)
        if cfg.save:
            _save(cfg.save, run, {name: dataclasses.astuple(one) for name, one in found.items()})
    plan = estimate(run, cluster, cost, data, constants)
    return Planned(cfg=run, cluster=cluster, data=data, constants=constants, plan=plan, notes=notes)


def _completed(run: PretrainConfig) -> PretrainConfig:
    """Squashes pictures where the recipe leaves it open, as `pretrain` does in a new run, takes a
    group that may shrink at its largest, and names no places but those of the training data."""
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, fit=run.model.fit or "squash"),
        data=dataclasses.replace(run.data, test=""),
        anchor=AnchorConfig(),
        run=dataclasses.replace(
            run.run,
            workers=run.run.most_workers,
            storage=RunConfig().storage,
            init_from=None,
        ),
    )


def data_size(cfg: PlanRunConfig, run: PretrainConfig) -> DataSize:
    """Returns the size of the data: as given by flags, else of the run's shards, else ImageNet's.

    Raises:
        ValueError: `--data.train` holds no shards of the objective's kind.
    """
    samples, size = IMAGES, IMAGE_BYTES if run.modality == "image" else SEGMENT_BYTES
    if run.data.train:
        from pipelines.loading.mixing import training_sets

        manifests = [part.manifest for part in training_sets(run)]
        shares = run.data.rows_by_set
        samples = sum(manifest.num_samples for manifest in manifests)
        size = sum(
            share * manifest.num_bytes / max(1, manifest.num_samples)
            for share, manifest in zip(shares, manifests, strict=True)
        ) / sum(shares)
    return DataSize(samples=cfg.images or samples, sample_bytes=cfg.image_bytes or size)


def _read(uri: str) -> str:
    fs, path = open_uri(uri)
    try:
        return str(fs.cat_file(path).decode())
    except UnicodeDecodeError as error:
        raise ValueError("--constants: not constants that --save wrote") from error


def _save(uri: str, run: PretrainConfig, found: dict[str, Any]) -> None:
    fs, path = open_uri(uri)
    text = json.dumps({"run": run.run.name, "constants": found}, indent=1)
    write_atomic(fs, path, text.encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command:
    """The command's flags: the plan's without a prefix, the recipe's prefixed by their section."""

    plan: Annotated[PlanRunConfig, tyro.conf.arg(name="")]
    recipe: Annotated[PretrainConfig, tyro.conf.arg(name="")]


def _print(found: Planned, as_text: bool) -> None:
    parts = (found.plan, found.cfg, found.cluster)
    if as_text:
        print(json.dumps(as_json(*parts, found.data, found.constants), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(*parts))
    for line in (*advice(*parts), *found.notes):
        console.print(line, markup=False, highlight=False)


def main() -> None:
    """Parses a recipe, the plan's flags and the overrides, and prints the plan."""
    commands = {
        name: (line, _Command(plan=PlanRunConfig(), recipe=recipe))
        for name, (line, recipe) in RECIPES.items()
    }
    run_command(
        lambda: tyro.extras.overridable_config_cli(commands, description=__doc__),
        lambda command: _print(plan_run(command.plan, command.recipe), command.plan.json),
        configs=lambda command: (command.recipe, command.plan),
    )


if __name__ == "__main__":
    main()
