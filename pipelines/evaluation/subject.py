"""The encoder under evaluation, loaded from a run or an artifact, and its untrained twin."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from models.artifacts.artifact import load_artifact
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from models.objectives.objective import Objective
from pipelines.config.data import ClipConfig
from pipelines.config.jobs import AlignConfig, EvaluateConfig
from pipelines.config.train import PretrainConfig
from pipelines.evaluation.features import preprocessing_of, with_regions
from pipelines.loading.clips import ClipSampler, training_sampler
from pipelines.runs.checkpoints import CheckpointError, encoder_of, load_objective
from pipelines.runtime.uris import open_uri


@dataclasses.dataclass(frozen=True)
class Subject:
    """The encoder under evaluation and where it comes from."""

    encoder: VisionTransformer
    preprocessing: Preprocessing
    provenance: dict[str, Any]
    run_uri: str | None = None
    """Folder of the training run, which holds its metrics; None for an artifact."""
    config: PretrainConfig | None = None
    """The run's configuration; None for an artifact."""
    sampler: ClipSampler | None = None
    """Chooses the frames of a clip; None for images."""
    objective: Objective | None = None
    """The run's whole objective, whose feature encoder is `encoder`; None for an artifact."""

    @property
    def name(self) -> str:
        """The run, or the artifact if it has none."""
        return str(self.provenance.get("run") or self.provenance["artifact"])

    @property
    def clip(self) -> dict[str, Any] | None:
        """`fps` and `stride` of clips, as an alignment's file has them; None for images."""
        if self.sampler is None:
            return None
        return {"fps": self.sampler.settings.fps, "stride": self.sampler.settings.stride}


def load_subject(uri: str) -> Subject:
    """Loads a checkpoint, a run's best checkpoint, an artifact, or a foreign model.

    Raises:
        ValueError: it is none of these; the message says what was tried.
    """
    fs, path = open_uri(uri)
    if fs.isfile(path) or _is_artifact(fs, path):
        artifact = load_artifact(uri)
        provenance = {"artifact": uri, **artifact.provenance}
        return Subject(artifact.encoder, artifact.preprocessing, provenance)
    try:
        objective, config, info = load_objective(uri)
        encoder = encoder_of(objective, config, info)
    except CheckpointError as error:
        raise ValueError(f"--checkpoint: no artifact, and {error}") from error
    objective.eval().requires_grad_(False)
    prep = preprocessing_of(config.model)
    checkpoint = str(info["uri"]).rstrip("/")
    provenance = {
        "run": config.run.name,
        "step": info["step"],
        "epoch": info["epoch"],
        "manifest_hash": info["manifest_hash"],
        "checkpoint": checkpoint.rpartition("/")[2],
    }
    run_uri, sampler = checkpoint.rpartition("/")[0], training_sampler(config)
    return Subject(
        encoder,
        prep,
        provenance,
        run_uri=run_uri,
        config=config,
        sampler=sampler,
        objective=objective,
    )


def _is_artifact(fs: Any, path: str) -> bool:
    if not fs.isfile(f"{path}/config.json"):
        return False
    keys = json.loads(fs.cat_file(f"{path}/config.json")).keys()
    return bool(keys & {"rayjepa", "architecture", "model_type"})


def random_init(encoder: VisionTransformer, seed: int) -> VisionTransformer:
    """Builds an untrained encoder of the same shape; the global RNG stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(encoder.shape).eval()


def with_sampler(cfg: EvaluateConfig | AlignConfig, subject: Subject, modality: str) -> Subject:
    """Sets by the flags which regions are left out and how clips are sampled.

    Without flags both are as in training. Images need no sampler.

    Raises:
        ValueError: both --fps and --stride are given.
    """
    if cfg.fps is not None and cfg.stride is not None:
        raise ValueError("--stride: goes without --fps")
    prep = with_regions(subject.preprocessing, cfg.exclude)
    subject = dataclasses.replace(subject, preprocessing=prep)
    if modality == "image":
        return dataclasses.replace(subject, sampler=None)
    settings = subject.sampler.settings if subject.sampler else ClipConfig()
    if cfg.fps is not None or cfg.stride is not None:
        settings = ClipConfig(fps=cfg.fps, stride=cfg.stride or 1)
    sampler = ClipSampler(frames=subject.encoder.frames, settings=settings)
    return dataclasses.replace(subject, sampler=sampler)
