"""Reads the results.json files of other evaluations and checks that their numbers compare."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.shards import Manifest
from pipelines.evaluation.probe_sets import SETS
from pipelines.runtime.uris import open_uri

Results = dict[str, Any]

NOT_COMPARED = {
    *("checkpoint", "data", "test", "shift_test", "out", "columns", "compare"),
    *("supervised_epochs", "batch_size", "seed", "layers", "align"),
}
"""Settings that may differ between two evaluations. All others must be equal for their numbers to
compare; the sets are compared by what they hold."""


def read_compared(cfg: EvaluateConfig, manifests: Sequence[Manifest]) -> list[Results]:
    """Reads `--compare`: results.json files, or folders that have one.

    Raises:
        ValueError: there is no such file, or it is of an evaluation on other data or with other
            settings.
    """
    return [_read(uri, cfg, manifests) for uri in cfg.compare]


def _read(uri: str, cfg: EvaluateConfig, manifests: Sequence[Manifest]) -> Results:
    fs, path = open_uri(uri)
    file = path if path.endswith(".json") else f"{path}/results.json"
    if not fs.isfile(file):
        raise ValueError(
            f"--compare {uri}: no results.json there; run pipelines.evaluate on it first"
        )
    results: Results = json.loads(fs.cat_file(file))
    if not {"rows", "data", "settings", "provenance"} <= results.keys():
        raise ValueError(f"--compare {uri}: these are no results of pipelines.evaluate")
    for name, manifest in zip(SETS, manifests, strict=False):
        if results["data"].get(name, {}).get("manifest_hash") != manifest.manifest_hash:
            flag = name.replace("_", "-")
            raise ValueError(f"--compare {uri}: was evaluated on other data than --{flag}")
    for field in dataclasses.fields(cfg):
        key = field.name
        if key in NOT_COMPARED:
            continue
        # An evaluation from before a setting existed was made with what is now its default.
        theirs, ours = results["settings"].get(key, _as_json(field.default)), getattr(cfg, key)
        if theirs != _as_json(ours):
            flag = key.replace("_", "-")
            raise ValueError(f"--compare {uri}: was evaluated with --{flag} {theirs}, not {ours}")
    return results


def _as_json(value: Any) -> Any:
    """Returns a setting as results.json holds it."""
    return list(value) if isinstance(value, tuple) else value


def name_of(results: Mapping[str, Any]) -> str:
    """Names an evaluation by its run and step, or else by what was evaluated."""
    provenance = results["provenance"]
    run = provenance.get("run") or results["settings"]["checkpoint"]
    return f"{run}, step {provenance['step']}" if "step" in provenance else str(run)
