"""The section of `pipelines.decode`'s page about what a world model imagines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.evaluation.beliefs.rollouts import Rollouts
from pipelines.evaluation.report.figures import image_uri

ROWS = {
    "real": "Real latents",
    "imagined": "Imagined",
    "shuffled": "Other actions",
    "copy": "Copy of the first frame",
}


def rollout_section(found: Rollouts) -> dict[str, Any]:
    """Returns what the template `rollouts.html.j2` shows."""
    clips = [
        [
            (
                panel.title,
                [image_uri(frame) for frame in panel.pixels[row].permute(1, 2, 3, 0).numpy()],
            )
            for panel in found.panels
        ]
        for row in range(len(found.panels[0].pixels))
    ]
    mrr = found.results["mrr"]
    return {
        "clips": clips,
        "columns": [f"{_steps(step)}" for step in mrr["imagined"]],
        "table": [(title, _cells(mrr[name])) for name, title in ROWS.items()],
        "chance": f"{found.results['chance']:.3f}",
        "samples": found.results["samples"],
    }


def rollout_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns the numbers as lines for the terminal."""
    asked = list(results["mrr"]["imagined"])
    head = "  ".join(_steps(step).rjust(8) for step in asked)
    lines = [
        f"mean reciprocal ranks among {results['samples']}, by chance {results['chance']:.3f}:",
        f"{'':24}{head}",
    ]
    for name, title in ROWS.items():
        cells = "  ".join(cell.rjust(8) for cell in _cells(results["mrr"][name]))
        lines.append(f"{title:24}{cells}")
    return lines


def _cells(by_step: Mapping[str, float]) -> list[str]:
    return [f"{value:.3f}" for value in by_step.values()]


def _steps(step: str) -> str:
    return f"{step} step{'s' if step != '1' else ''}"
