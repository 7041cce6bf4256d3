"""Every job's configuration: frozen keyword-only dataclasses, and their JSON round trip.

No torch and no Ray here: a config is built on a laptop, shown by `--help`, written to the run
folder and read back by every later job. Validation names the flag at fault.
"""

from __future__ import annotations

from pipelines.config.as_json import from_json, to_json
from pipelines.config.data import (
    ClipConfig,
    DataConfig,
    MaskConfig,
    VideoMaskConfig,
)
from pipelines.config.ingest import (
    IngestConfig,
    LiveConfig,
    VideoConfig,
)
from pipelines.config.jobs import (
    DemoConfig,
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
)
from pipelines.config.sweep import SweepConfig
from pipelines.config.train import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    WatchConfig,
)
from pipelines.config.views import ViewsConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ClipConfig",
    "DataConfig",
    "DemoConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "IngestConfig",
    "LiveConfig",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PretrainConfig",
    "RunConfig",
    "SweepConfig",
    "VideoConfig",
    "VideoMaskConfig",
    "ViewsConfig",
    "WatchConfig",
    "from_json",
    "to_json",
]
