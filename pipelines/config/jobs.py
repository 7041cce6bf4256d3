"""What comes after training: evaluation, export, embedding; and the demo that does it all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.config.checks import require
from pipelines.config.pixels import check_deep_range, parse_colour
from pipelines.config.places import PlaceField, ReadPlace, WrittenPlace


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What an encoder learned: kNN, linear probe, few-shot, RankMe, beside two baselines; of clips
    also an attentive probe, and the encoder on single frames as a third baseline."""

    checkpoint: ReadPlace
    """Checkpoint or exported artifact (folder or `s3://` prefix); a run folder means its best checkpoint."""
    data: ReadPlace
    """Labelled shards the probes learn from."""
    test: ReadPlace
    """Labelled shards the probes are scored on."""
    shift_test: ReadPlace | None = None
    """A second test set, scored by the same probes as --test: what a change of the footage costs."""
    out: WrittenPlace = "evaluation"
    """Folder for results.json and report.html."""
    only: str | None = None
    """Use only rows of this class of the shards (of games, one game)."""
    state: str | None = None
    """Of video: instead of the shards' classes, this column of a frame's `states` (a number, or a name
    in --columns), in bins, at the clip's middle frame."""
    columns: ReadPlace | None = None
    """columns.json of `pipelines.fetch gameplay`: what --state's names are, by the game in --only."""
    bins: int = 4
    """Classes made of --state, each with an equal share of the training set."""
    supervised_epochs: int = 0
    """Epochs of the supervised baseline, the same encoder trained from scratch on the labels; its
    pixels are kept in memory. 0 leaves it out."""
    knn_k: int = 20
    """Neighbours that vote."""
    knn_temperature: float = 0.07
    """Softmax temperature of the votes."""
    probe_epochs: int = 50
    """Epochs of the linear probe."""
    attentive_epochs: int = 20
    """Epochs of the attentive probe of clips; 0 leaves it out, and is what images get."""
    attentive_lrs: tuple[float, ...] = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
    """Its learning rates, each tried with each decay in one pass; fewer take less time."""
    attentive_decays: tuple[float, ...] = (0.01, 0.1, 0.4, 0.8)
    """Its weight decays."""
    attentive_standardise: bool = False
    """Standardise tokens by training statistics first, as the linear probe does. Not V-JEPA's protocol; a
    few hundred clips are often too few steps for the probe to leave its start without."""
    fps: float | None = None
    """Frames a second of clips; None, unless --stride is given, is what the encoder was trained on."""
    stride: int | None = None
    """Frames of a segment from one frame of a clip to the next; None as above."""
    batch_size: int = 256
    """Images, or frames of clips, per forward pass."""
    limit: int | None = None
    """Use at most this many images or clips of each set."""
    compare: tuple[ReadPlace, ...] = ()
    """results.json files (or their folders) of other evaluations on the same data, to stand beside."""
    seed: int = 0
    """Seed of random-init, few-shot draws and probe order."""

    def __post_init__(self) -> None:
        require(self.bins >= 2, "bins", "must be at least 2")
        for flag in ("attentive_lrs", "attentive_decays"):
            require(len(getattr(self, flag)) > 0, flag.replace("_", "-"), "needs a value")
        require(self.supervised_epochs >= 0, "supervised-epochs", "must not be negative")
        given = self.state is not None or self.columns is None
        require(given, "columns", "names the columns of --state, which is not given")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint's target encoder as an artifact that timm and transformers load."""

    checkpoint: ReadPlace
    """Checkpoint, or a run folder (its best checkpoint)."""
    out: WrittenPlace
    """Folder of the artifact."""
    background: str | None = None
    """What the served encoder sees through transparent places: `black`, `white`, `R,G,B` or `#rrggbb`;
    None takes what the training shards were ingested with, black if they are gone."""
    deep_range: int | Literal["auto"] | None = None
    """White of 16-bit images that are served, as --deep-range of ingest; None as above, or 65535."""

    def __post_init__(self) -> None:
        if self.background is not None:
            parse_colour("background", self.background)
        if self.deep_range is not None:
            check_deep_range("deep-range", self.deep_range)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """A whole data set through an exported encoder into Parquet."""

    artifact: ReadPlace
    """Folder or `s3://` prefix of the exported artifact."""
    data: Annotated[str, PlaceField(unless="follow")]
    """Ingested shards."""
    out: WrittenPlace
    """Folder or `s3://` prefix for the embedding Parquet files."""
    pooling: Literal["mean", "patches"] = "mean"
    """One vector an image or video segment, or one a patch."""
    fps: float | None = None
    """Frames a second of the clip that stands for a segment, its middle; None takes them by --stride."""
    stride: int = 1
    """Frames of a segment from one frame of its clip to the next."""
    batch_size: int = 256
    """Images, or frames of clips, per forward pass."""
    workers: int = 1
    """Actors in the pool."""
    gpu: bool = False
    """One GPU an actor."""
    follow: bool = False
    """The data set grows (a live stream): embed every new shard, in this process, until ingest ends."""
    poll_seconds: float = 2.0
    """With --follow: how often to look for new shards."""

    def __post_init__(self) -> None:
        require(self.fps is None or self.fps > 0, "fps", "must be positive")
        require(self.stride > 0, "stride", "must be positive")
        require(self.fps is None or self.stride == 1, "stride", "goes without --fps")
        require(self.poll_seconds > 0, "poll-seconds", "must be positive")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole way on the shipped CIFAR-10 sample, ending in an HTTP request."""

    out: WrittenPlace = "demo-out"
    """Folder of everything the demo makes; run again, it goes on from what is there."""
    recipe: Literal[
        "vicreg_cifar10_demo",
        "lejepa_cifar10_demo",
        "cifar10_demo",
        "mae_cifar10_demo",
        "dmjd_cifar10_demo",
    ] = "vicreg_cifar10_demo"
    """What is pretrained; `cifar10_demo` is I-JEPA. benchmarks/training/objectives.md compares them."""
    seed: int = 0
    """Seed of weights, order, crops and masks."""
    steps: int | None = None
    """Optimizer steps; None takes the recipe's."""
    precision: Literal["fp32", "bf16"] | None = None
    """Autocast type; None takes bf16 where the CPU has it, else the recipe's."""
