"""Pretrains an encoder on ingested shards, on one machine or a cluster.

    python -m pipelines.pretrain RECIPE --data.train URI [overrides]
    python -m pipelines.pretrain RECIPE --dry-run [overrides]

Running the command again with the same name and storage resumes the run exactly where it stopped;
see docs/checkpoints.md. --dry-run says what a run would need, see docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Annotated

if __name__ == "__main__" and not __package__:  # `python pipelines/pretrain.py`, uninstalled
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import tyro

from pipelines.config.jobs import DryRunConfig
from pipelines.config.train import PretrainConfig
from pipelines.recipes.registry import RECIPES
from pipelines.runtime.errors import run_command
from pipelines.training.launch import PretrainResult, pretrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command:
    """The flags of a dry run without a prefix, the recipe's prefixed by their section."""

    dry: Annotated[DryRunConfig, tyro.conf.arg(name="")]
    recipe: Annotated[PretrainConfig, tyro.conf.arg(name="")]


def main() -> None:
    """Parses a recipe and its overrides, trains, and prints where the result is."""
    commands = {
        name: (line, _Command(dry=DryRunConfig(), recipe=recipe))
        for name, (line, recipe) in RECIPES.items()
    }
    run_command(
        lambda: tyro.extras.overridable_config_cli(commands, description=__doc__),
        _run,
        configs=lambda command: (command.recipe,),
    )


def _run(command: _Command) -> None:
    if command.dry.dry_run:
        from pipelines.capacity.dry_run import dry_run

        print("\n".join(dry_run(command.recipe, command.dry)))
    else:
        _report(pretrain(command.recipe))


def _report(result: PretrainResult) -> None:
    print(f"run {result.run_uri} at step {result.step}")
    print(f"best checkpoint {result.best_checkpoint}")
    print(f"last checkpoint {result.last_checkpoint}")


if __name__ == "__main__":
    main()
