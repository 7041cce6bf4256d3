"""Embedding without Ray."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from pipelines import embed as job
from pipelines.config.jobs import EmbedConfig


def embed_here(parts: Any, cfg: EmbedConfig, *_: Any) -> None:
    """In place of `pipelines.embed._run` and its actor pool: the same actor, in this process."""
    threads = torch.get_num_threads()
    actor = job.Embedder(cfg)
    torch.set_num_threads(threads)
    for part in parts:
        assert actor({"part": json.dumps(dataclasses.asdict(part))})["rows"] == part.rows
