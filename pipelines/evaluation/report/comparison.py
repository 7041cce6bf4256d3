"""Other evaluations beside this one: their results.json files, read and checked to be comparable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.shards import Manifest
from pipelines.evaluation.probe_sets import SETS
from pipelines.runtime.uris import open_uri

Results = dict[str, Any]

COMPARED = (
    *("knn_k", "knn_temperature", "probe_epochs", "limit", "fps", "stride"),
    *("attentive_epochs", "attentive_lrs", "attentive_decays", "attentive_standardise"),
    *("only", "state", "bins"),
)
"""Settings that must be equal for two evaluations to compare."""


def read_compared(cfg: EvaluateConfig, manifests: Sequence[Manifest]) -> list[Results]:
    """Reads `--compare`: results.json files, or folders that have one.

    Raises:
        ValueError: none there, or an evaluation on other data or by other settings.
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
    for key in COMPARED:
        theirs, ours = results["settings"].get(key), getattr(cfg, key)
        if theirs != (list(ours) if isinstance(ours, tuple) else ours):
            flag = key.replace("_", "-")
            raise ValueError(f"--compare {uri}: was evaluated with --{flag} {theirs}, not {ours}")
    return results


def name_of(results: Results) -> str:
    """Whose evaluation it is: the run and its step, or what was evaluated."""
    provenance = results["provenance"]
    run = provenance.get("run") or results["settings"]["checkpoint"]
    return f"{run}, step {provenance['step']}" if "step" in provenance else str(run)


def compared_rows(results: Results, others: Sequence[Results]) -> dict[str, Mapping[str, Any]]:
    """Encoders by name, this one first, then the baselines of this one; equal names are numbered."""
    rows: dict[str, Mapping[str, Any]] = {}
    for one in (results, *others):
        name = name_of(one)
        taken = sum(known == name or known.startswith(f"{name} (") for known in rows)
        rows[f"{name} ({taken + 1})" if taken else name] = one["rows"]["encoder"]
    baselines = {key: row for key, row in results["rows"].items() if key != "encoder"}
    return {**rows, **{key.replace("_", " "): row for key, row in baselines.items()}}
