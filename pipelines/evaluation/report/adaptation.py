"""What adapting an encoder did, as tables for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from rich.table import Table

from pipelines.evaluation.probes.registry import scored_probes

FOOTAGE = {"old_footage": "old footage", "new_footage": "new footage"}
ROWS = {
    "old": "old encoder",
    "adapted": "adapted encoder, probes of the old one",
    "aligned": "the same, features aligned",
    "refitted": "adapted encoder, probes fitted anew",
    "random": "random weights",
}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Adapted: {{ run }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; font-weight: 600; }
</style></head><body>
<h1>{{ run }}</h1><p>Adapted from {{ origin.checkpoint }} (step {{ origin.step }}).</p>
{% for table in tables %}<table><caption>{{ table.caption }}</caption>
<tr>{% for name in table.head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}<p>Accuracies are in per cent; in brackets is the change from the old encoder in points.
Aligned features were
brought back to the old encoder's by the affine map in alignment.safetensors, which was fitted on
old footage without labels. Cosine and CKA compare the features of the same samples by both
encoders; 1 means unchanged.</p>
</body></html>
"""

Drawn = dict[str, Any]
"""`caption`, `head` and `rows` of a table, all text."""


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Draws adapt.json for a terminal."""
    return [_rich(drawn) for drawn in _drawn(results)]


def as_html(results: Mapping[str, Any]) -> str:
    """Returns adapt.json as one HTML page without external resources."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE).render(
        run=results["run"], origin=results["from"], tables=_drawn(results)
    )


def _drawn(results: Mapping[str, Any]) -> list[Drawn]:
    found = [
        _accuracies(name, results["probes"][key])
        for key, name in FOOTAGE.items()
        if key in results.get("probes", {})
    ]
    drift = {FOOTAGE[key]: values for key, values in results["drift"].items()}
    rows = [[name, f"{v['cosine']:.3f}", f"{v['cka']:.3f}"] for name, v in drift.items()]
    head = ["features, old and adapted", "cosine", "CKA"]
    return [*found, {"caption": "how far the features moved", "head": head, "rows": rows}]


def _accuracies(footage: str, rows: Mapping[str, Mapping[str, float]]) -> Drawn:
    probes = {key: one for key, one in scored_probes().items() if key in rows["old"]}
    return {
        "caption": f"labelled {footage}, accuracy in %",
        "head": ["", *(probe.columns[0].name for probe in probes.values())],
        "rows": [
            [ROWS[key], *(_cell(row[name], rows["old"][name], key) for name in probes)]
            for key, row in rows.items()
        ],
    }


def _cell(accuracy: float, before: float, row: str) -> str:
    change = f" ({100 * (accuracy - before):+.1f})" if row not in ("old", "random") else ""
    return f"{100 * accuracy:.1f}{change}"


def _rich(drawn: Drawn) -> Table:
    table = Table(title=drawn["caption"])
    for number, name in enumerate(drawn["head"]):
        table.add_column(name, justify="right" if number else "left")
    for row in drawn["rows"]:
        table.add_row(*row)
    return table
