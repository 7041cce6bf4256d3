"""Exports a checkpoint's target encoder as an artifact that timm and transformers load.

    python -m pipelines.export --checkpoint runs/demo --out artifact

    timm.create_model("local-dir:artifact", pretrained=True)
    transformers.IJepaModel.from_pretrained("artifact/transformers")

Before it is published, the artifact is read back and its features are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# Lets `python pipelines/export.py` work from an uninstalled checkout, as `ray job submit` runs it.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import torch
import tyro

from models.artifacts.artifact import save_artifact
from models.beliefs.expectation import Expectation, Surprise
from models.beliefs.stored import save_surprise
from models.media.pictures.deep import FULL
from models.media.preprocessing import Preprocessing
from models.objectives.objective import Objective
from models.scratch import scratch
from pipelines.config.checks import parse_colour
from pipelines.config.jobs import ExportConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.rows import load_samples
from pipelines.evaluation.beliefs.masks import choose_masks, future_masks
from pipelines.evaluation.beliefs.study import ORDINARY, check_whole
from pipelines.evaluation.beliefs.surprises import calibrated
from pipelines.evaluation.beliefs.tokens import normalised_patches
from pipelines.evaluation.features import decode_all, preprocessing_of, with_regions
from pipelines.loading.clips import training_sampler
from pipelines.loading.mixing import identity_of, training_sets
from pipelines.runs.checkpoints import encoder_of, load_objective
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import is_local, open_uri

PACKAGES = ("torch", "timm")


def export(cfg: ExportConfig, *, say: Callable[[str], object] = print) -> str:
    """Writes the artifact of a checkpoint.

    Args:
        cfg: The job.
        say: Takes a line for the user about what other libraries cannot do as this project does.

    Returns:
        `cfg.out`.

    Raises:
        CheckpointError: There is no such checkpoint, or it does not load.
        ValueError: `cfg.out` holds something that is not an artifact.
        RuntimeError: The artifact gives other features when read back; nothing is published.
    """
    cfg = prepare(cfg)
    objective, config, info = load_objective(cfg.checkpoint)
    encoder = encoder_of(objective, config, info).eval()
    model = config.model
    ingested = ingest_settings(config, info["manifest_hash"])
    prep = with_regions(preprocessing_of(model), cfg.exclude)
    prep = with_pixel_settings(prep, cfg, ingested)
    provenance = {
        "run": config.run.name,
        "step": info["step"],
        "epoch": info["epoch"],
        "manifest_hash": info["manifest_hash"],
        "objective": config.objective.name,
        "preset": model.encoder,
        "metrics": info["metrics"],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    add = None
    if cfg.surprise != "none":
        surprise = measure_surprise(cfg, objective, config, prep)
        add = functools.partial(save_surprise, surprise=surprise)
    fs, path = open_uri(cfg.out)
    if is_local(fs):
        for line in save_artifact(pathlib.Path(path), encoder, prep, provenance, add=add):
            say(f"note: {line}")
        return cfg.out
    with scratch("export") as folder:
        built = folder / "artifact"
        limits = save_artifact(built, encoder, prep, provenance, add=add)
        _upload(built, fs, path, cfg.out)
    for line in limits:
        say(f"note: {line}")
    return cfg.out


def measure_surprise(
    cfg: ExportConfig, objective: Objective, config: PretrainConfig, prep: Preprocessing
) -> Surprise:
    """Tells the predictor's usual errors on samples of --surprise-data.

    Raises:
        ValueError: the objective predicts no tokens, samples may lack tokens, images are asked for
            their future, or there is no data.
    """
    try:
        expectation = Expectation.of(objective)
        check_whole(prep)
    except ValueError as error:
        raise ValueError(f"--surprise {cfg.surprise}: {error}") from error
    sampler = training_sampler(config)
    if cfg.surprise == "future" and (sampler is None or config.model.grid.tubes < 2):
        raise ValueError("--surprise future: images have none; take --surprise own")
    data = cfg.surprise_data or config.data.train
    try:
        rows = load_samples(data, ORDINARY)
    except Exception as error:  # storage that is gone may raise anything
        raise ValueError(
            f"--surprise: the predictor's usual errors are told from the training data, and {data} "
            "cannot be read.\nName other shards of the same kind with --surprise-data."
        ) from error
    pixels = decode_all(rows, prep, sampler).pixels
    with torch.no_grad():
        expectation.fit(normalised_patches(expectation, prep, pixels))
    masks = (choose_masks if cfg.surprise == "own" else future_masks)(config)
    return calibrated(expectation, prep, masks, pixels)


def ingest_settings(config: PretrainConfig, manifest_hash: str) -> dict[str, Any]:
    """The settings with which the training shards were ingested; {} if they no longer exist."""
    try:
        manifests = [one.manifest for one in training_sets(config)]
    except Exception:  # storage that is gone may raise anything, and the export can do without
        return {}
    return manifests[0].ingest if identity_of(manifests) == manifest_hash else {}


def with_pixel_settings(
    prep: Preprocessing, cfg: ExportConfig, ingested: Mapping[str, Any]
) -> Preprocessing:
    """Adds how encoded images become RGB: as the flags say, else as at ingestion.

    Shards hold plain RGB, so training needs none of this; users of the artifact do.
    """
    background = cfg.background or ingested.get("background", "black")
    return dataclasses.replace(
        prep,
        background=parse_colour("background", background),
        deep_range=cfg.deep_range or ingested.get("deep_range", FULL),
    )


def _upload(built: pathlib.Path, fs: Any, path: str, uri: str) -> None:
    """Replaces what is under `uri` by the artifact.

    config.json goes last: a folder without it is not an artifact.
    """
    if fs.exists(path) and fs.ls(path):
        config = f"{path}/config.json"
        if not fs.exists(config) or "rayjepa" not in json.loads(fs.cat_file(config)):
            raise ValueError(f"{uri} holds something that is not an artifact; not replacing it")
        fs.rm_file(config)
    files = [file.relative_to(built).as_posix() for file in built.rglob("*") if file.is_file()]
    for name in sorted(files, key=lambda name: name == "config.json"):
        fs.pipe_file(f"{path}/{name}", (built / name).read_bytes())


def main() -> None:
    """Entry point of `python -m pipelines.export`."""
    run_command(
        lambda: tyro.cli(ExportConfig, description=__doc__),
        lambda cfg: print(f"artifact: {export(cfg)}"),
    )


if __name__ == "__main__":
    main()
