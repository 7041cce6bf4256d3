"""A training run: model, watch and anchor, and all of its parts together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from models.image_size import Grid, ImageSize, as_image_size, height_width, size_text
from models.media.fit import Fit
from models.media.regions import Region
from pipelines.config.checks import require
from pipelines.config.data import ClipConfig, DataConfig, MaskConfig, VideoMaskConfig
from pipelines.config.input_flags import (
    checked_regions,
    exclude_flag,
    size_flag,
    workers_text,
)
from pipelines.config.objectives import REGISTERED, Masks, Modality, ObjectiveConfig
from pipelines.config.optim import WHOLE_MATRICES, OptimConfig
from pipelines.config.places import PlaceField
from pipelines.config.run import RunConfig
from pipelines.config.views import ViewsConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder and predictor shapes; presets are in `models.encoders.shape.PRESETS`."""

    encoder: str = "vit_s"
    """Preset: vit_ti, vit_s, vit_b, vit_l, vit_h, vit_g, or a small one for 32-pixel images; for
    clips video_b, video_l, video_h, video_g, or a small one."""
    image_size: Annotated[ImageSize, size_flag("model.image-size")] = 224
    """Pixels of the input: one number for a square, or HEIGHTxWIDTH, such as 144x256."""
    fit: Fit | None = None
    """How a picture is fitted to the input, in training and wherever the encoder is used. crop: its
    centre, in the input's aspect. pad: all of it, with bars. squash: all of it, stretched. whole:
    all of it in its own aspect, on a grid of its own with no more tokens than the input's. None:
    squash for a new run, while a run that is resumed keeps its own."""
    exclude: Annotated[tuple[Region, ...], exclude_flag("model.exclude")] = ()
    """Regions of the picture that are left out: their tokens are neither context nor target, and
    the encoder never computes them. Each is LEFT,TOP,RIGHT,BOTTOM in fractions of the width and
    height, or FILE:SET, a set of a TOML file with lines such as hud = [[0.0, 0.0, 1.0, 0.1]]."""
    patch_size: int = 16
    """Pixels on a side of one patch."""
    frames: int = 1
    """Frames of a clip; 1 for images."""
    tubelet: int = 1
    """Frames in one token; divides `frames`."""
    positions: Literal["sincos", "rope", "rope_released"] = "sincos"
    """Fixed sine-cosine embeddings (I-JEPA, V-JEPA), or rotary ones (V-JEPA 2; `rope_released` is
    the layout of its published weights)."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them: less memory, a third
    more time."""
    predictor_width: int | None = None
    """Overrides the preset's predictor width."""
    predictor_depth: int | None = None
    """Overrides the preset's predictor depth."""
    init: Literal["normal", "fan_in"] = "normal"
    """Initial weights of encoder and predictor: `normal` with deviation 0.02, as in the papers, or
    `fan_in`, 1 / sqrt(inputs). At widths of about 100, 0.02 is so small that short runs stand
    still for hundreds of steps."""
    predictor_input: Literal["tokens", "mean"] = "tokens"
    """`tokens`: the predictor or decoder reads every context token. `mean`: it reads only their
    mean, so that this one vector has to hold what is predicted (after Kim et al. 2025, Token
    Bottleneck, arXiv 2507.06543). Linear probes and kNN read the mean too."""
    patch_std: float = 0.02
    """Standard deviation of the initial patch embedding where --model.init is normal. At the usual
    0.02 the fixed positions are louder than the image; short runs on small images learn sooner with
    0.14."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means subtracted on the device, of values in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Channel standard deviations divided by on the device."""

    def __post_init__(self) -> None:
        require(self.patch_size > 0, "model.patch-size", "must be positive")
        object.__setattr__(self, "image_size", as_image_size(self.image_size))
        require(
            all(s >= self.patch_size and s % self.patch_size == 0 for s in self.height_width),
            "model.image-size",
            f"must be a multiple of --model.patch-size ({self.patch_size}), got "
            f"{size_text(self.image_size)}",
        )
        object.__setattr__(self, "exclude", checked_regions("model.exclude", self.exclude))
        require(self.patch_std > 0, "model.patch-std", "must be positive")
        require(self.frames > 0, "model.frames", "must be positive")
        require(
            self.tubelet > 0 and self.frames % self.tubelet == 0,
            "model.tubelet",
            f"must divide --model.frames ({self.frames}), got {self.tubelet}",
        )

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the input, pixels."""
        return height_width(self.image_size)

    @property
    def grid(self) -> Grid:
        """The grid of tokens of an image or a clip."""
        height, width = self.height_width
        return Grid(
            height // self.patch_size, width // self.patch_size, self.frames // self.tubelet
        )

    @property
    def chosen_fit(self) -> Fit:
        """`fit`, or `crop` for runs made before there was a choice."""
        return self.fit or "crop"

    @property
    def partial(self) -> bool:
        """Whether samples may have fewer tokens than `grid`, or grids of their own."""
        return self.chosen_fit == "whole" or bool(self.exclude)


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run counts as collapsed. Judged on the pooled features of the encoder that is kept
    and, for joint embeddings, on the embeddings too."""

    action: Literal["stop", "warn", "off"] = "stop"
    """What to do when features collapse."""
    min_rankme: float = 2.0
    """Collapsed when RankMe (effective rank, 1 = a single direction) of the centred features falls
    below this."""
    min_std: float = 1e-3
    """Collapsed when the mean per-dimension standard deviation falls below this."""
    min_embedded_std: float = 0.1
    """As min_std, for the embeddings, whose target under SIGReg and VICReg is 1. Healthy runs have
    0.5 to 0.95; without these losses it is below 0.06 after 30 steps."""
    max_cosine: float = 0.9999
    """Collapsed when the mean pairwise cosine rises above this."""
    patience: int = 2
    """Number of consecutive readings (one every `run.log_every` steps) that must show a
    collapse."""
    grace_steps: int = 20
    """Steps before the first judgement."""

    def __post_init__(self) -> None:
        require(self.patience > 0, "watch.patience", "must be positive")
        require(self.grace_steps >= 0, "watch.grace-steps", "must be >= 0")


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Keeps the features of old footage where an earlier encoder had them, for probes that were
    fitted on them (docs/adapting.md)."""

    weight: float = 0.0
    """Weight of the anchor: the squared distance of the encoder's tokens of --data.mix from the
    earlier encoder's, relative to their variance, times the objective's own loss. 0 is none."""
    checkpoint: Annotated[str, PlaceField(required=False)] | None = None
    """Checkpoint of the earlier encoder, which has the model of this run."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "anchor.weight", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run, complete."""

    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    video_mask: VideoMaskConfig = field(default_factory=VideoMaskConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        lanes, accumulate = self.data.lanes, self.run.accumulate
        by_lanes = [n for n in self._range if lanes % n == 0]
        told = f"must divide --data.lanes ({lanes}), got {workers_text(self.run.workers)}"
        require(bool(by_lanes), "run.workers", told)
        require(
            any(self.data.batch_size % (n * accumulate) == 0 for n in by_lanes),
            "run.accumulate",
            f"workers x accumulate ({by_lanes[-1] * accumulate}) must divide --data.batch-size",
        )
        require(
            self.optim.warmup_steps <= self.run.steps,
            "optim.warmup-steps",
            f"must not exceed --run.steps ({self.run.steps})",
        )
        require(
            self.modality == "video" or self.model.frames == 1,
            "model.frames",
            f"--objective.name {self.objective.name} learns from images; clips need "
            f"{', '.join(name for name, r in REGISTERED.items() if r.modality == 'video')}",
        )
        require(
            self.objective.name != "videomae" or self.video_mask.generators == 1,
            "video-mask.kind",
            "videomae takes one mask a clip: tube, or one entry of --video-mask.blocks",
        )
        require(
            not self.compares_rows or self.data.batch_size // accumulate > 1,
            "run.accumulate",
            f"{self.objective.name} needs two rows or more in a micro-batch",
        )
        require(
            self.run.parallel == "ddp" or self.optim.name not in WHOLE_MATRICES,
            "run.parallel",
            f"--optim.name {self.optim.name} reads whole matrices or sums over them, of which a "
            f"worker of {self.run.parallel} has a part.\nUse --run.parallel ddp, or --optim.name "
            "adamw, hyper-adamw or schedulefree.",
        )
        self._check_actions()
        self._check_anchor()
        masks = self.mask if self.modality == "image" else self.video_mask
        require(
            not self.data.mix or masks.truncate != "legacy",
            "data.mix",
            "needs masks of a fixed size: legacy ones are cut to the shortest of a set's batch",
        )
        if self.masks == "none":
            sides = height_width(self.views.local_size or self.model.image_size)
            ok = all(
                side % self.model.patch_size == 0 and side <= most
                for side, most in zip(sides, self.model.height_width, strict=True)
            )
            require(
                ok, "views.local-size", "must be a multiple of --model.patch-size, no larger image"
            )
            require(
                self.model.fit != "whole",
                "model.fit",
                f"whole needs a masked objective; {self.objective.name} compares views of one size."
                " Use squash or pad",
            )

    def _check_actions(self) -> None:
        if not self.objective.registered.actions:
            return
        name, width = self.objective.name, self.objective.action_width
        require(
            self.clip.fps is None and width % self.clip.stride == 0,
            "clip.stride",
            f"--objective.name {name} needs the actions of whole frames: give no --clip.fps, and a "
            f"stride that divides --objective.action-width ({width})",
        )
        require(
            self.model.frames == 1,
            "model.frames",
            f"{name} encodes frames one by one; --objective.window is the length of its clips",
        )
        require(
            not self.data.flip and self.data.crop_scale == self.data.crop_ratio == (1.0, 1.0),
            "data.crop-scale",
            f"{name} must see where things are: use --data.crop-scale 1 1 --data.crop-ratio 1 1 "
            "and no --data.flip",
        )
        require(not self.model.partial, "model.exclude", f"{name} reads whole frames of one size")

    def _check_anchor(self) -> None:
        anchor, data = self.anchor, self.data
        if not anchor.weight:
            return
        require(bool(data.mix), "anchor.weight", "needs old footage in --data.mix")
        require(anchor.checkpoint is not None, "anchor.checkpoint", "goes with --anchor.weight")
        require(
            self.masks != "none" or not self.model.exclude,
            "anchor.weight",
            "reads whole pictures, but views leave --model.exclude out",
        )
        require(
            bool(self.group_sizes),
            "run.accumulate",
            f"workers x accumulate ({self.run.most_workers * self.run.accumulate}) must divide "
            f"--data.lanes ({data.lanes}), so that every part has old footage for the anchor",
        )

    @property
    def _range(self) -> range:
        return range(self.run.fewest_workers, self.run.most_workers + 1)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The numbers of workers with which the run may train, ascending.

        Every worker has whole lanes of the batch, and equal micro-batches.
        """
        whole = self.data.lanes if self.anchor.weight else self.data.batch_size
        return tuple(
            n
            for n in self._range
            if self.data.lanes % n == 0 and whole % (n * self.run.accumulate) == 0
        )

    @property
    def modality(self) -> Modality:
        """What the objective learns from, and the shards must hold."""
        return self.objective.registered.modality

    @property
    def clip_frames(self) -> int:
        """Frames of the clips that the loader makes; 1 for images."""
        return self.objective.window if self.objective.registered.actions else self.model.frames

    @property
    def masks(self) -> Masks:
        """Which masks the objective asks the loader for (`pipelines.loading.masks.maskers`)."""
        return self.objective.registered.masks

    @property
    def compares_rows(self) -> bool:
        """Whether the loss compares the rows of a micro-batch, instead of being a mean over
        rows."""
        over_batch = self.objective.own.get("target_norm", "token") != "token"
        return self.masks == "none" or self.objective.regularize is not None or over_batch

    @property
    def model_settings(self) -> dict[str, Any]:
        """`model` and the number of mask generators, for
        `models.objectives.registry.build_objective`."""
        return dataclasses.asdict(self.model) | {"mask_tokens": self.video_mask.generators}

    @property
    def objective_settings(self) -> dict[str, Any]:
        """The chosen objective's own fields, the views and the seed, for `build_objective`."""
        views = dataclasses.asdict(self.views)
        return self.objective.own | {"views": views, "seed": self.run.seed}
