"""Pretrains an encoder on ingested shards, on one machine or a cluster.

    python -m pipelines.pretrain RECIPE --data.train URI [overrides]

Running the command again with the same name and storage resumes the run exactly where it stopped;
see docs/checkpoints.md.
"""

from __future__ import annotations

import pathlib
import sys

if __name__ == "__main__" and not __package__:  # `python pipelines/pretrain.py`, uninstalled
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

from pipelines.runtime.errors import run_command
from pipelines.training.launch import PretrainResult, pretrain


def main() -> None:
    """Parses a recipe and its overrides, trains, and prints where the result is."""
    import tyro

    from pipelines.recipes.registry import RECIPES

    run_command(
        lambda: tyro.extras.overridable_config_cli(RECIPES, description=__doc__),
        lambda cfg: _report(pretrain(cfg)),
    )


def _report(result: PretrainResult) -> None:
    print(f"run {result.run_uri} at step {result.step}")
    print(f"best checkpoint {result.best_checkpoint}")
    print(f"last checkpoint {result.last_checkpoint}")


if __name__ == "__main__":
    main()
