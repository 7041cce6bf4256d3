"""Every job's configuration: frozen keyword-only dataclasses, and their JSON round trip.

No torch and no Ray here: a config is built on a laptop, shown by `--help`, written to the run
folder and read back by every later job. Validation names the flag at fault.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _require(condition: bool, flag: str, message: str) -> None:
    if not condition:
        raise ValueError(f"--{flag}: {message}")


def _require_range(bounds: tuple[float, float], flag: str, low: float, high: float) -> None:
    ok = low < bounds[0] <= bounds[1] <= high
    _require(ok, flag, f"must satisfy {low} < low <= high <= {high}, got {bounds}")


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How video is cut into segments and stored."""

    fps: float = 15.0
    """Constant frame rate of every segment; sources are resampled by their timestamps."""
    segment_seconds: float = 10.0
    """Length of a segment, the last of a file may be shorter. A clip is drawn from one segment."""
    key_frame_every: int = 15
    """Frames between key frames: the most a loader decodes before the first frame it wants."""
    crf: int = 20
    """H.264 quality: 0 is lossless, 23 usual, more is smaller and worse."""
    preset: Literal["ultrafast", "veryfast", "medium", "slow"] = "veryfast"
    """H.264 encoder effort: slower is smaller at the same quality."""
    max_gap: float = 5.0
    """Seconds a frame is shown on when none follows; a longer gap starts a new segment after it."""
    max_pixels: int = 16_777_216
    """Files with larger frames than this are quarantined, undecoded."""
    max_bytes: int = 17_179_869_184
    """Files larger than this many bytes are quarantined, unread."""
    max_seconds: float = 86_400.0
    """Files longer than this are quarantined; one that only turns out longer is cut there."""

    def __post_init__(self) -> None:
        _require(0 < self.fps <= 1000, "video.fps", "must be positive, at most 1000")
        _require(
            round(self.fps * self.segment_seconds) >= 1,
            "video.segment-seconds",
            "must hold at least one frame",
        )
        _require(self.key_frame_every > 0, "video.key-frame-every", "must be positive")
        _require(0 <= self.crf <= 51, "video.crf", "must be between 0 and 51")
        for flag in ("max_gap", "max_pixels", "max_bytes", "max_seconds"):
            _require(getattr(self, flag) > 0, f"video.{flag.replace('_', '-')}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Raw images or videos of any source to validated Parquet shards."""

    source: str
    """Folder, `s3://` prefix or CSV list (`path,label`) of images or videos; for images also a
    WebDataset tar (or a folder or glob of them), or a Parquet file or folder."""
    out: str
    """Where shards, manifest and quarantine go: a local folder or an `s3://` prefix."""
    format: Literal["auto", "folder", "list", "webdataset", "parquet"] = "auto"
    """How to read `source`; `auto` decides by the file names found there."""
    modality: Literal["auto", "image", "video"] = "auto"
    """What to make of the files; `auto` decides by their names (GIFs alone are images)."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """How video is cut and stored."""
    image_column: str = "image"
    """Parquet sources: the column of encoded bytes (or Hugging Face's `{bytes, path}` struct)."""
    label_column: str = "label"
    """Parquet sources: the column of labels; absent means unlabelled."""
    short_side: int | None = None
    """Resize so that the short side has this many pixels (never enlarges) and re-encode. Video is
    always re-encoded, and its sides are rounded to even numbers."""
    encode: Literal["keep", "jpeg", "png", "webp"] = "keep"
    """Re-encode as this; `keep` stores the bytes as they came unless resizing, EXIF rotation or an
    unusual colour mode makes re-encoding necessary."""
    quality: int = 95
    """JPEG and WebP quality when re-encoding."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are quarantined as decompression bombs, undecoded."""
    max_bytes: int = 67_108_864
    """Images larger than this many bytes are quarantined, unread."""
    shard_bytes: int = 134_217_728
    """Aim for shards of this many bytes."""
    row_group_rows: int = 64
    """Rows in one Parquet row group: the smallest unit a loader reads."""

    def __post_init__(self) -> None:
        _require(
            self.short_side is None or self.short_side >= 8, "short-side", "must be at least 8"
        )
        _require(1 <= self.quality <= 100, "quality", "must be between 1 and 100")
        _require(self.max_pixels > 0, "max-pixels", "must be positive")
        _require(self.max_bytes > 0, "max-bytes", "must be positive")
        _require(self.shard_bytes >= 1024, "shard-bytes", "must be at least 1024")
        _require(self.row_group_rows > 0, "row-group-rows", "must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards to train on and how a batch is made of them."""

    train: str = ""
    """Folder or `s3://` prefix of ingested shards to pretrain on."""
    test: str = ""
    """Labelled shards held out for the online probe; empty splits nothing off and skips the probe."""
    batch_size: int = 256
    """Images or clips in one optimizer step, over all workers and accumulation steps."""
    lanes: int = 8
    """Independent streams a global batch is made of: worker r of W reads lanes [r*L/W, (r+1)*L/W).
    The data a run sees depends on this, never on the number of workers, which must divide it."""
    shuffle_window: int = 1024
    """Rows of one lane shuffled together, on top of the permutation of row groups."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Area range of the random resized crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect-ratio range of the crop."""
    flip: bool = False
    """Flip half of the images or clips left-right (V-JEPA does, I-JEPA does not)."""
    decode_in: Literal["trainer", "data"] = "trainer"
    """Where images are decoded: threads beside the device (one host), or Ray Data tasks (clusters
    with spare CPU nodes, which then ship uint8 crops)."""
    decode_threads: int = 2
    """Decoder threads per worker when `decode_in` is `trainer`."""
    prefetch_batches: int = 4
    """Batches kept ready ahead of the step."""

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, "data.batch-size", "must be positive")
        _require(self.lanes > 0, "data.lanes", "must be positive")
        _require(
            self.batch_size % self.lanes == 0,
            "data.batch-size",
            f"must be a multiple of --data.lanes ({self.lanes}), got {self.batch_size}",
        )
        _require(self.shuffle_window > 0, "data.shuffle-window", "must be positive")
        _require_range(self.crop_scale, "data.crop-scale", 0.0, 1.0)
        _require_range(self.crop_ratio, "data.crop-ratio", 0.0, 10.0)
        _require(self.decode_threads > 0, "data.decode-threads", "must be positive")
        _require(self.prefetch_batches > 0, "data.prefetch-batches", "must be positive")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """I-JEPA multi-block masks (Assran et al. 2023, section 3 and appendix A)."""

    num_targets: int = 4
    """Target blocks per image; they may overlap one another."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    """Area range of one target block, as a fraction of the patch grid."""
    target_ratio: tuple[float, float] = (0.75, 1.5)
    """Aspect-ratio range of a target block."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Area range of the square context block, before the targets are cut out of it."""
    context_keep: int | None = None
    """Context tokens kept per image, constant through the run; None takes a share of the grid that
    2 to 8% of the draws miss (those are drawn again)."""
    truncate: Literal["random", "legacy"] = "random"
    """`random` keeps a random subset of fixed size; `legacy` reproduces the original: one block
    size a batch, scale and ratio from one draw, last row and column never reached, every list cut
    to the batch's shortest in raster order."""

    def __post_init__(self) -> None:
        _require(self.num_targets > 0, "mask.num-targets", "must be positive")
        _require_range(self.target_scale, "mask.target-scale", 0.0, 1.0)
        _require_range(self.target_ratio, "mask.target-ratio", 0.0, 10.0)
        _require_range(self.context_scale, "mask.context-scale", 0.0, 1.0)
        keep = self.context_keep
        _require(keep is None or keep > 0, "mask.context-keep", "must be positive")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which frames of a stored segment make up a clip; how many is `model.frames`."""

    fps: float | None = None
    """Frames a second of the clip, whatever the segment's rate; None counts frames by `stride`."""
    stride: int = 1
    """Frames of the segment from one frame of the clip to the next."""
    jitter: bool = True
    """Start anywhere in the segment, drawn anew in every epoch; otherwise take its middle, as
    evaluation always does."""

    def __post_init__(self) -> None:
        _require(self.fps is None or self.fps > 0, "clip.fps", "must be positive")
        _require(self.stride > 0, "clip.stride", "must be positive")
        _require(self.fps is None or self.stride == 1, "clip.stride", "goes without --clip.fps")


@dataclass(frozen=True, kw_only=True)
class VideoMaskConfig:
    """V-JEPA's masks of clips (Bardes et al. 2024, section 3.2 and appendix B).

    One entry of `blocks`, `scale` and `temporal_scale` is one generator: every clip is masked once
    by each, with a mask token of its own, and all share one pass of the target encoder.
    """

    kind: Literal["blocks", "tube"] = "blocks"
    """`blocks` hides the union of some blocks; `tube` hides the same random patches at all times."""
    blocks: tuple[int, ...] = (8, 2)
    """Blocks of each generator. V-JEPA: 8 small ones (short range) and 2 large ones (long range)."""
    scale: tuple[float, ...] = (0.15, 0.7)
    """Area of each generator's blocks, as a fraction of the patch grid."""
    ratio: tuple[float, float] = (0.75, 1.5)
    """Aspect-ratio range of all blocks."""
    temporal_scale: tuple[float, ...] = (1.0, 1.0)
    """Share of the clip that each generator's blocks last; 1 is all of it, as in V-JEPA."""
    tube_ratio: float = 0.9
    """Share of the patches that `tube` hides."""
    truncate: Literal["random", "legacy"] = "random"
    """`random` keeps random subsets of fixed size; `legacy` reproduces the original: one block size
    a batch, every list cut to the batch's shortest from its end, which is the end of the clip."""

    def __post_init__(self) -> None:
        for flag in ("scale", "temporal_scale"):
            values, name = getattr(self, flag), f"video-mask.{flag.replace('_', '-')}"
            _require(len(values) == len(self.blocks), name, "needs as many as --video-mask.blocks")
            _require(all(0 < v <= 1 for v in values), name, "must lie in (0, 1]")
        ok = len(self.blocks) > 0 and min(self.blocks) > 0
        _require(ok, "video-mask.blocks", "must be positive")
        _require_range(self.ratio, "video-mask.ratio", 0.0, 10.0)
        _require(0 < self.tube_ratio < 1, "video-mask.tube-ratio", "must lie between 0 and 1")

    @property
    def generators(self) -> int:
        """Masks of one clip, and mask tokens of the predictor."""
        return len(self.blocks) if self.kind == "blocks" else 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder and predictor shapes; names are rows of `models.vit.PRESETS`."""

    encoder: str = "vit_s"
    """Preset: vit_ti, vit_s, vit_b, vit_l, vit_h, vit_g, or a small one for 32-pixel images; for
    clips video_b, video_l, video_h, video_g, or a small one."""
    image_size: int = 224
    """Pixels on a side of the square training crop."""
    patch_size: int = 16
    """Pixels on a side of one patch."""
    frames: int = 1
    """Frames of a clip; 1 for images."""
    tubelet: int = 1
    """Frames in one token; divides `frames`."""
    positions: Literal["sincos", "rope", "rope_released"] = "sincos"
    """Fixed sine-cosine embeddings (I-JEPA, V-JEPA), or rotary ones (V-JEPA 2; `rope_released` is the
    layout of its published weights)."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them: less memory, a third
    more time."""
    predictor_width: int | None = None
    """Overrides the preset's predictor width."""
    predictor_depth: int | None = None
    """Overrides the preset's predictor depth."""
    patch_std: float = 0.02
    """Standard deviation of the initial patch embedding. At the usual 0.02 the fixed positions are
    louder than the image; short runs on small images learn sooner with 0.14."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means subtracted on the device, of values in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Channel standard deviations divided by on the device."""

    def __post_init__(self) -> None:
        _require(self.patch_size > 0, "model.patch-size", "must be positive")
        _require(
            self.image_size >= self.patch_size and self.image_size % self.patch_size == 0,
            "model.image-size",
            f"must be a multiple of --model.patch-size ({self.patch_size}), got {self.image_size}",
        )
        _require(self.patch_std > 0, "model.patch-std", "must be positive")
        _require(self.frames > 0, "model.frames", "must be positive")
        _require(
            self.tubelet > 0 and self.frames % self.tubelet == 0,
            "model.tubelet",
            f"must divide --model.frames ({self.frames}), got {self.tubelet}",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned; names are rows of `models.objectives.OBJECTIVES`."""

    name: str = "ijepa"
    """The objective."""
    loss: Literal["smooth_l1", "l2", "l1"] = "smooth_l1"
    """Distance between predicted and target features (I-JEPA's code: smooth_l1; its paper: l2)."""
    ema: tuple[float, float] = (0.996, 1.0)
    """Momentum of the target encoder at the first and at the last step, linear between."""
    target: Literal["ema", "self"] = "ema"
    """`ema` is the method. `self` is the negative control: the context encoder is its own target,
    gradient and all, and must collapse."""

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.ema[0] <= self.ema[1] <= 1.0, "objective.ema", "0 <= start <= end <= 1"
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules, all pure functions of the step."""

    lr: float = 1e-3
    """Peak learning rate."""
    start_lr: float = 2e-4
    """Learning rate at step 0, raised linearly to `lr` over `warmup_steps`."""
    final_lr: float = 1e-6
    """Learning rate at the last step (cosine from the peak)."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.04
    """Weight decay at step 0."""
    final_weight_decay: float = 0.4
    """Weight decay at the last step (cosine between)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    clip_norm: float | None = None
    """Clip the gradient's norm, encoder and predictor together, to this; None, as in I-JEPA, does not
    clip."""

    def __post_init__(self) -> None:
        _require(
            self.lr >= 0 and self.start_lr >= 0 and self.final_lr >= 0, "optim.lr", "must be >= 0"
        )
        _require(self.warmup_steps >= 0, "optim.warmup-steps", "must be >= 0")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas", "must lie in [0, 1)")
        _require(
            self.clip_norm is None or self.clip_norm > 0, "optim.clip-norm", "must be positive"
        )


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run counts as collapsed, judged on the pooled target output."""

    action: Literal["stop", "warn", "off"] = "stop"
    """What to do about a collapse."""
    min_rankme: float = 2.0
    """Collapsed when RankMe (effective rank, 1 = a single direction) of the centred features falls
    below this."""
    min_std: float = 1e-3
    """Collapsed when the mean per-dimension standard deviation falls below this."""
    max_cosine: float = 0.9999
    """Collapsed when the mean pairwise cosine rises above this."""
    patience: int = 2
    """Readings in a row (one every `run.log_every` steps) that must agree."""
    grace_steps: int = 20
    """Steps before the first judgement."""

    def __post_init__(self) -> None:
        _require(self.patience > 0, "watch.patience", "must be positive")
        _require(self.grace_steps >= 0, "watch.grace-steps", "must be >= 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where, with how many workers, and what is kept."""

    name: str = "run"
    """Folder of this run under `storage`; the same name again resumes it."""
    storage: str = "runs"
    """Where runs live: a local folder or an `s3://` prefix."""
    steps: int = 1000
    """Optimizer steps in the whole run; the schedules end here."""
    stop_after: int | None = None
    """Stop, checkpointed, after this step as if interrupted; the schedules still aim at `steps`."""
    seed: int = 0
    """Weights, order, crops and masks follow from it."""
    workers: int = 1
    """Training processes; must divide --data.lanes."""
    gpu: bool = False
    """One GPU a worker (NCCL); otherwise CPU (gloo)."""
    cpus_per_worker: float = 0.5
    """CPUs reserved a worker; leave room for Ray Data tasks on the same machine."""
    threads: int | None = None
    """Torch threads per worker on CPU; None divides the machine's cores among its workers."""
    accumulate: int = 1
    """Micro-batches per optimizer step on every worker."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast type; weights, EMA and optimizer state stay fp32."""
    compile: bool = False
    """torch.compile the objective (static shapes)."""
    log_every: int = 10
    """Steps between readings of metrics: the only host syncs."""
    probe_every: int = 0
    """Steps between online kNN probes; 0 for never."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the best by online probe, and the newest."""
    max_failures: int = 3
    """Restarts from the newest checkpoint after a worker or node is lost; -1 for no limit."""
    init_from: str | None = None
    """Checkpoint whose weights start the run when the run has none of its own."""
    log_samples: bool = False
    """Write the sample ids of every step to `samples-rank*.jsonl` (audits and tests)."""

    def __post_init__(self) -> None:
        for flag in ("steps", "workers", "accumulate", "log_every", "checkpoint_every"):
            _require(getattr(self, flag) > 0, f"run.{flag.replace('_', '-')}", "must be positive")
        _require(self.cpus_per_worker > 0, "run.cpus-per-worker", "must be positive")
        _require(self.keep_checkpoints > 0, "run.keep-checkpoints", "must be positive")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run, complete."""

    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    video_mask: VideoMaskConfig = field(default_factory=VideoMaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        lanes, workers, accumulate = self.data.lanes, self.run.workers, self.run.accumulate
        _require(lanes % workers == 0, "run.workers", f"must divide --data.lanes ({lanes})")
        _require(
            self.data.batch_size % (workers * accumulate) == 0,
            "run.accumulate",
            f"workers x accumulate ({workers * accumulate}) must divide --data.batch-size",
        )
        _require(
            self.optim.warmup_steps <= self.run.steps,
            "optim.warmup-steps",
            f"must not exceed --run.steps ({self.run.steps})",
        )
        _require(
            self.modality == "video" or self.model.frames == 1,
            "model.frames",
            f"--objective.name {self.objective.name} learns from images; clips need vjepa",
        )

    @property
    def modality(self) -> Literal["image", "video"]:
        """What the objective learns from, and the shards must hold."""
        return "video" if self.objective.name == "vjepa" else "image"

    @property
    def model_settings(self) -> dict[str, Any]:
        """`model` as `models.objectives.build_objective` takes it."""
        return dataclasses.asdict(self.model) | {"mask_tokens": self.video_mask.generators}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What an encoder learned: kNN, linear probe, few-shot, RankMe, beside two baselines; of clips
    also an attentive probe, and the encoder on single frames as a third baseline."""

    checkpoint: str
    """Checkpoint or exported artifact (folder or `s3://` prefix); a run folder means its best checkpoint."""
    data: str
    """Labelled shards the probes learn from."""
    test: str
    """Labelled shards the probes are scored on."""
    out: str = "evaluation"
    """Folder for results.json and report.html."""
    knn_k: int = 20
    """Neighbours that vote."""
    knn_temperature: float = 0.07
    """Softmax temperature of the votes."""
    probe_epochs: int = 50
    """Epochs of the linear probe."""
    attentive_epochs: int = 20
    """Epochs of the attentive probe of clips; 0 leaves it out, and is what images get."""
    fps: float | None = None
    """Frames a second of clips; None, unless --stride is given, is what the encoder was trained on."""
    stride: int | None = None
    """Frames of a segment from one frame of a clip to the next; None as above."""
    batch_size: int = 256
    """Images, or frames of clips, per forward pass."""
    limit: int | None = None
    """Use at most this many images or clips of each set."""
    seed: int = 0
    """Seed of random-init, few-shot draws and probe order."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint's target encoder as an artifact that timm and transformers load."""

    checkpoint: str
    """Checkpoint, or a run folder (its best checkpoint)."""
    out: str
    """Folder of the artifact."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """A whole data set through an exported encoder into Parquet."""

    artifact: str
    """Folder or `s3://` prefix of the exported artifact."""
    data: str
    """Ingested shards."""
    out: str
    """Folder or `s3://` prefix for the embedding Parquet files."""
    pooling: Literal["mean", "patches"] = "mean"
    """One vector an image, or one a patch."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int = 1
    """Actors in the pool."""
    gpu: bool = False
    """One GPU an actor."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole way on the shipped CIFAR-10 sample, ending in an HTTP request."""

    out: str = "demo-out"
    """Folder of everything the demo makes; run again, it goes on from what is there."""
    seed: int = 0
    """Seed of weights, order, crops and masks."""
    steps: int | None = None
    """Optimizer steps; None takes the recipe's."""
    precision: Literal["fp32", "bf16"] | None = None
    """Autocast type; None takes bf16 where the CPU has it, else the recipe's."""


def to_json(config: Any) -> str:
    """Returns `config` (any dataclass of this file) as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(cls: type[T], text: str) -> T:
    """Rebuilds a `cls` from `to_json`'s text.

    Raises:
        ValueError: an unknown or missing key, named with its path, or a value that fails validation.
    """
    return _from_dict(cls, json.loads(text), cls.__name__)


def _from_dict(cls: type[T], values: dict[str, Any], path: str) -> T:
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{path}: unknown keys {unknown}")
    try:
        return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _from_dict(hint, value, path)
    if isinstance(hint, types.UnionType):
        return None if value is None else _convert(typing.get_args(hint)[0], value, path)
    return tuple(value) if typing.get_origin(hint) is tuple else value
