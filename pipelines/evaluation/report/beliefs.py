"""The sections of the report about what a predictor expects, and the page of `pipelines.decode`.

Shape suffixes: B samples, S time steps, H and W rows and columns of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from pipelines.evaluation.beliefs.study import Study
from pipelines.evaluation.report.figures import picture_uri
from pipelines.evaluation.report.maps import shaded

FULL_COLOUR = 4.0
"""Surprise, or one over it, that is drawn in full colour."""

COLUMNS = {
    "all_tokens": "all tokens",
    "pooled": "their mean",
    "shuffled": "all, shuffled",
    "hidden_true": "hidden, true",
    "hidden_expected": "hidden, expected",
    "hidden_shuffled": "expected, shuffled",
    "hidden_mean_picture": "mean picture",
    "chance": "chance",
}
"""Columns of the table by name in `results.json`."""
ROWS = {"encoder": "Encoder", "random_init": "Random init"}
CUTS = {"encoder": "encoder", "random_init": "random init", "pixel_change": "change of pixels"}


def environment() -> jinja2.Environment:
    """Returns what fills the report's templates."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def belief_section(found: Study) -> dict[str, Any]:
    """Returns what the template `beliefs.html.j2` shows."""
    results = found.results
    pictures = [[picture_uri(_last(one)) for one in panel.pixels] for panel in found.panels]
    return {
        "titles": [panel.title for panel in found.panels],
        "rows": [list(row) for row in zip(*pictures, strict=True)],
        "columns": [*COLUMNS.values(), "cosine", "of the place"],
        "table": [(ROWS[name], _cells(row)) for name, row in results["rows"].items()],
        "samples": results["samples"],
        "surprise": _surprise(found),
        "cuts": [(CUTS[name], f"{v:.3f}") for name, v in results.get("cuts", {}).items()],
    }


def page(kind: str, results: Mapping[str, Any], section: Mapping[str, Any], noun: str) -> str:
    """Returns the page of `pipelines.decode` as HTML.

    Args:
        kind: the name of the section's template, and of what it shows there.
        results: what results.json holds.
        section: what the template shows.
        noun: what a sample is called.
    """
    template = environment().get_template("belief_page.html.j2")
    name = results["provenance"]["run"]
    return template.render(kind=kind, name=name, noun=noun, results=results, **{kind: section})


def belief_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns the numbers as lines for the terminal."""
    names = {key: max(len(title), 6) for key, title in COLUMNS.items()}
    head = "  ".join(COLUMNS[key].rjust(width) for key, width in names.items())
    lines = [f"mean reciprocal ranks among {results['samples']}:", f"{'':11}  {head}"]
    for name, row in results["rows"].items():
        cells = "  ".join(f"{row['mrr'][key]:.3f}".rjust(width) for key, width in names.items())
        lines.append(f"{ROWS[name]:11}  {cells}")
    cosine = results["rows"]["encoder"]["cosine"]
    lines.append(
        f"cosine of expected and true tokens {cosine['expected']:.3f}; "
        f"of the place's mean instead {cosine['place']:.3f}"
    )
    if cuts := results.get("cuts"):
        told = ", ".join(f"{CUTS[name]} {value:.3f}" for name, value in cuts.items())
        lines.append(f"cuts told from ordinary clips by surprise, AUROC: {told}")
    return lines


def _cells(row: Mapping[str, Any]) -> list[str]:
    numbers = [*(row["mrr"][name] for name in COLUMNS), *_cosines(row)]
    return [f"{number:.3f}" for number in numbers]


def _cosines(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["cosine"]["expected"], row["cosine"]["place"]


def _surprise(found: Study) -> list[tuple[str, str, str]]:
    """Pairs every sample with its map, as data URIs, and its surprise as a whole."""
    grid = found.surprises["encoder"].expectation.encoder.grid
    maps_BSHW = found.maps_BN.reshape(-1, grid.tubes, grid.rows, grid.columns)
    tint_BSHW = (maps_BSHW.log() / np.log(FULL_COLOUR)).clamp(-1, 1).numpy()
    drawn = []
    for pixels, tint_SHW, whole in zip(found.shown, tint_BSHW, found.whole_B, strict=True):
        picture = _last(pixels)
        drawn.append(
            (picture_uri(picture), picture_uri(shaded(picture, tint_SHW)), f"{float(whole):.2f}")
        )
    return drawn


def _last(pixels: torch.Tensor) -> np.ndarray:
    """Returns pixels with channels last: [H, W, C] or [T, H, W, C]."""
    return pixels.movedim(0, -1).numpy()
