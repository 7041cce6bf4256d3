"""Settings of the jobs around training, of a sweep and of the demo, whose flags they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from models.media.regions import Region
from pipelines.config.checks import check_deep_range, parse_colour, require
from pipelines.config.input_flags import exclude_flag
from pipelines.config.places import PlaceField, ReadPlace, WrittenPlace


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluates an encoder by kNN, linear probe, few-shot and RankMe, beside two baselines. Clips
    also get an attentive probe, and the encoder on single frames as a third baseline."""

    checkpoint: ReadPlace
    """Checkpoint or exported artifact (folder or `s3://` prefix). A run folder stands for its best
    checkpoint."""
    data: ReadPlace
    """Labelled shards that the probes are trained on."""
    test: ReadPlace
    """Labelled shards that the probes are tested on."""
    shift_test: ReadPlace | None = None
    """A second test set for the same probes, which shows how accuracy changes on other footage."""
    out: WrittenPlace = "evaluation"
    """Folder for results.json and report.html."""
    align: ReadPlace | None = None
    """File of `pipelines.align` for --shift-test; one more row reads its aligned features."""
    only: str | None = None
    """Use only rows of this class of the shards, for example one game."""
    state: str | None = None
    """Video: instead of the shards' classes, predict this column of a frame's `states` (a number,
    or a name in --columns), in bins, at the middle frame of the clip."""
    number: tuple[str, ...] = ()
    """Video: read these columns of a frame's `states` as numbers (R2, mean absolute error, rank
    correlation), at the middle frame of the clip; named as for --state. Without --state, they take
    the place of the shards' classes."""
    columns: ReadPlace | None = None
    """columns.json of `pipelines.fetch gameplay`: the names for --state and --number, for the game
    in --only."""
    bins: int = 4
    """Number of classes that --state is divided into, each with an equal share of the training
    set."""
    supervised_epochs: int = 0
    """Epochs of the supervised baseline, the same encoder trained from scratch on the labels; its
    pixels are kept in memory. 0 leaves it out."""
    layers: Literal["last", "all"] = "last"
    """Blocks of the encoder whose features are tried. `all` also probes the block that is read
    best: one more pass over --data takes the features of every block, and a linear probe is fitted
    to nine tenths of them and chooses on the rest. Random weights choose theirs in the same way.
    These features take at most 4 GiB; of more samples, as many as fit are drawn."""
    knn_k: int = 20
    """Number of neighbours that vote in kNN."""
    knn_temperature: float = 0.07
    """Softmax temperature of the kNN votes."""
    probe_epochs: int = 50
    """Epochs of the linear probe."""
    attentive_epochs: int = 20
    """Epochs of the attentive probe on clips; 0 leaves it out. Images have none."""
    attentive_lrs: tuple[float, ...] = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
    """Learning rates of the attentive probe. Each is tried with each decay in one pass; fewer take
    less time."""
    attentive_decays: tuple[float, ...] = (0.01, 0.1, 0.4, 0.8)
    """Weight decays of the attentive probe."""
    attentive_standardise: bool = False
    """Standardise tokens by training statistics first, as the linear probe does. This is not
    V-JEPA's protocol, but with only a few hundred clips the attentive probe often learns nothing
    without it."""
    fps: float | None = None
    """Frames per second of clips. None, without --stride, takes the rate of training."""
    stride: int | None = None
    """Distance between two frames of a clip, in frames of the segment; None as for --fps."""
    exclude: Annotated[tuple[Region, ...] | None, exclude_flag("exclude")] = None
    """Regions of the picture that are left out, in place of the encoder's own:
    LEFT,TOP,RIGHT,BOTTOM in fractions of the width and height, FILE:SET of a TOML file, or none."""
    near_duplicates: float | None = None
    """Leave out samples of --test and --shift-test that nearly equal one of --data: no cell of
    their grey thumbnails differs by more than so many of 255 levels (4 tells scenes of games
    apart). Of a clip, the middle frame is compared; regions left out do not count."""
    decode_steps: int = 0
    """Optimizer steps of decoders (1500 are usual): the report then draws what the run's predictor
    expects behind masks, and surprise. Needs a checkpoint of ijepa, vjepa or dmjd."""
    batch_size: int = 256
    """Images, or frames of clips, per forward pass."""
    limit: int | None = None
    """Use at most this many images or clips of each set."""
    compare: tuple[ReadPlace, ...] = ()
    """results.json files (or their folders) of other evaluations on the same data, shown
    beside this one."""
    seed: int = 0
    """Seed of the random encoder, the few-shot draws and the order of probe training."""

    def __post_init__(self) -> None:
        require(self.bins >= 2, "bins", "must be at least 2")
        shifted = self.align is None or self.shift_test is not None
        require(shifted, "align", "maps the features of --shift-test; name that footage too")
        for flag in ("attentive_lrs", "attentive_decays"):
            require(len(getattr(self, flag)) > 0, flag.replace("_", "-"), "needs a value")
        for flag in ("supervised_epochs", "decode_steps"):
            require(getattr(self, flag) >= 0, flag.replace("_", "-"), "must not be negative")
        levels = self.near_duplicates is None or 0 <= self.near_duplicates < 255
        require(levels, "near-duplicates", "must be at least 0 and below 255")
        given = self.state is not None or bool(self.number) or self.columns is None
        require(given, "columns", "names the columns of --state or --number; neither is given")
        require(len(set(self.number)) == len(self.number), "number", "names a column twice")
        learns = self.has_classes or self.supervised_epochs == 0
        require(learns, "supervised-epochs", "learns classes, but --number has none; add --state")

    @property
    def all_blocks(self) -> bool:
        """Whether all blocks are tried and not only the last one."""
        return self.layers == "all"

    @property
    def has_classes(self) -> bool:
        """Whether classes are told apart: those of the shards, or bins of --state."""
        return self.state is not None or not self.number


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Fits the affine map that gives the features of new footage the statistics of old footage, so
    that old probes read them. Nothing is trained, and labels are not read."""

    checkpoint: ReadPlace
    """Checkpoint or exported artifact (folder or `s3://` prefix). A run folder stands for its best
    checkpoint."""
    old: ReadPlace
    """Shards of old footage, such as the probes were fitted on."""
    new: ReadPlace
    """Shards of new footage."""
    out: Annotated[str, PlaceField(written=True, file=True)]
    """File of the alignment (`.safetensors`), for `--align` of evaluate and embed, and `align` of
    the endpoint."""
    how: Literal["mean", "covariance"] = "mean"
    """What becomes equal: the means, or also the covariances."""
    only: str | None = None
    """Use only rows of this class of the shards: the game or camera that the alignment is for."""
    exclude: Annotated[tuple[Region, ...] | None, exclude_flag("exclude")] = None
    """Regions of the picture that are left out, in place of the encoder's own:
    LEFT,TOP,RIGHT,BOTTOM in fractions of the width and height, FILE:SET of a TOML file, or none."""
    fps: float | None = None
    """Frames per second of clips. None, without --stride, takes the rate of training."""
    stride: int | None = None
    """Distance between two frames of a clip, in frames of the segment; None as for --fps."""
    batch_size: int = 256
    """Images, or frames of clips, per forward pass."""
    limit: int = 2000
    """Use at most this many images or clips of each kind of footage."""

    def __post_init__(self) -> None:
        require(self.limit >= 4, "limit", f"must be at least 4, got {self.limit}")
        require(self.batch_size > 0, "batch-size", "must be positive")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Exports the target encoder of a checkpoint as an artifact that timm and transformers load."""

    checkpoint: ReadPlace
    """Checkpoint, or a run folder (its best checkpoint)."""
    out: WrittenPlace
    """Folder of the artifact."""
    background: str | None = None
    """Colour that fills the transparent parts of images when serving: `black`, `white`, `R,G,B` or
    `#rrggbb`. None takes the colour of the training shards, or black if they are gone."""
    deep_range: int | Literal["auto"] | None = None
    """Value of white in 16-bit images when serving, like --deep-range of ingest. None takes the
    value of the training shards, or 65535 if they are gone."""
    exclude: Annotated[tuple[Region, ...] | None, exclude_flag("exclude")] = None
    """Regions of the picture that the artifact leaves out unless it is told otherwise, in place of
    the run's own: LEFT,TOP,RIGHT,BOTTOM in fractions of the width and height, FILE:SET of a TOML
    file, or none."""
    surprise: Literal["none", "own", "future"] = "none"
    """Export the predictor too, for `pooling: surprise`. `own` hides parts of the input as the run
    did; `future` hides each time step of a clip behind all that came before."""
    surprise_data: ReadPlace | None = None
    """Shards that usual errors are told from. None takes those of training."""

    def __post_init__(self) -> None:
        used = self.surprise != "none" or self.surprise_data is None
        require(used, "surprise-data", "goes with --surprise own or future")
        if self.background is not None:
            parse_colour("background", self.background)
        if self.deep_range is not None:
            check_deep_range("deep-range", self.deep_range)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embeds a whole data set with an exported encoder and writes Parquet files."""

    artifact: ReadPlace
    """Folder or `s3://` prefix of the exported artifact."""
    data: Annotated[str, PlaceField(unless="follow")]
    """Ingested shards."""
    out: WrittenPlace
    """Folder or `s3://` prefix for the embedding Parquet files."""
    pooling: Literal["mean", "patches"] = "mean"
    """One vector per image or video segment (`mean`), or one per patch (`patches`)."""
    align: ReadPlace | None = None
    """File of `pipelines.align` or `pipelines.adapt` that maps the embeddings, so that old probes
    read them."""
    exclude: Annotated[tuple[Region, ...] | None, exclude_flag("exclude")] = None
    """Regions of the picture that are left out, in place of the artifact's own:
    LEFT,TOP,RIGHT,BOTTOM in fractions of the width and height, FILE:SET of a TOML file, or none."""
    fps: float | None = None
    """Frames per second of the clip, which is the middle of a segment. None uses --stride."""
    stride: int = 1
    """Distance between two frames of the clip, in frames of the segment."""
    batch_size: int = 256
    """Images, or frames of clips, per forward pass."""
    workers: int = 1
    """Number of Ray actors that embed."""
    gpu: bool = False
    """Give every actor one GPU."""
    follow: bool = False
    """The data set still grows (live stream): embed every new shard, in this process, until ingest
    ends."""
    poll_seconds: float = 2.0
    """With --follow: seconds between looks for new shards."""

    def __post_init__(self) -> None:
        require(self.fps is None or self.fps > 0, "fps", "must be positive")
        require(self.stride > 0, "stride", "must be positive")
        require(self.fps is None or self.stride == 1, "stride", "goes without --fps")
        require(self.poll_seconds > 0, "poll-seconds", "must be positive")


@dataclass(frozen=True, kw_only=True)
class OldFootageConfig:
    """Old footage that is trained on beside the new, so that the encoder forgets less."""

    old: float = 0.5
    """Share of old footage in every batch; 0 trains on the new footage alone."""
    data: ReadPlace | None = None
    """Shards of the old footage. None takes those that the old run was trained on."""

    def __post_init__(self) -> None:
        require(0 <= self.old < 1, "mix.old", f"must be at least 0 and below 1, got {self.old}")


@dataclass(frozen=True, kw_only=True)
class OldProbesConfig:
    """Labelled footage on which the adapted encoder is compared with the old one. Nothing of it is
    trained on, except the probes."""

    train: ReadPlace | None = None
    """Labelled old footage that the probes are fitted on, by the features of the old encoder."""
    test: ReadPlace | None = None
    """Labelled old footage that the probes are read on."""
    new: ReadPlace | None = None
    """Labelled new footage that the same probes are read on."""
    only: str | None = None
    """As --only of evaluate."""
    state: str | None = None
    """As --state of evaluate."""
    columns: ReadPlace | None = None
    """As --columns of evaluate."""
    bins: int = 4
    """As --bins of evaluate."""
    limit: int | None = None
    """Use at most this many images or clips of each set."""
    attentive_epochs: int = 20
    """Epochs of the attentive probe on clips; 0 leaves it out."""

    def __post_init__(self) -> None:
        pair = (self.train is None) == (self.test is None)
        require(pair, "probe.train", "goes with --probe.test, and the reverse")
        require(self.new is None or self.test is not None, "probe.new", "needs --probe.train")


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Continues the pretraining of a finished run on new unlabelled footage, as a new run."""

    rate: float = 0.2
    """Peak learning rate as a share of the old run's; --optim.lr sets the rate itself."""
    length: float = 0.25
    """Number of steps as a share of the old run's; --run.steps sets the number itself."""
    mix: OldFootageConfig = field(default_factory=OldFootageConfig)
    """Old footage that is trained on too."""
    probe: OldProbesConfig = field(default_factory=OldProbesConfig)
    """Labelled footage for the comparison."""

    def __post_init__(self) -> None:
        require(self.rate > 0, "rate", "must be positive")
        require(self.length > 0, "length", "must be positive")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Runs everything on the shipped CIFAR-10 sample, from ingest to an HTTP request."""

    out: WrittenPlace = "demo-out"
    """Folder of all results. If it holds some already, the demo continues from there."""
    recipe: Literal[
        "vicreg_cifar10_demo",
        "lejepa_cifar10_demo",
        "cifar10_demo",
        "mae_cifar10_demo",
        "dmjd_cifar10_demo",
    ] = "vicreg_cifar10_demo"
    """Pretraining recipe; `cifar10_demo` is I-JEPA. benchmarks/training/objectives.md compares
    them."""
    seed: int = 0
    """Seed of weights, order, crops and masks."""
    steps: int | None = None
    """Optimizer steps; None takes the recipe's."""
    precision: Literal["fp32", "bf16"] | None = None
    """Autocast type; None takes bf16 where the CPU has it, else the recipe's."""


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """What a run needs, counted and printed instead of training it."""

    dry_run: bool = False
    """Print parameters, FLOPs of a step, memory of a worker, and images or clips a second at --mfu,
    and train nothing. No data is read and no Ray is started."""
    accelerator: str | None = None
    """--dry-run: the GPU of a worker: A100, A100-80GB, H100, H200, A10G or L4. None takes this
    machine's own device, whose rate of matrix products is measured; and all of these for a recipe
    with GPUs where there is none."""
    mfu: float = 0.3
    """--dry-run: the share of the device's peak that the step reaches. I-JEPA's own ViT-H/14 run
    had about 0.2."""

    def __post_init__(self) -> None:
        require(0 < self.mfu <= 1, "mfu", f"a share between 0 and 1; got {self.mfu}")
        require(self.dry_run or self.accelerator is None, "accelerator", "goes with --dry-run")


@dataclass(frozen=True, kw_only=True)
class PlanRunConfig:
    """Estimates what a pretraining run needs and takes on a cluster. Nothing is trained."""

    cluster: str = "this"
    """Type of the hosts: `this` for this machine's, or one of AWS such as g6.2xlarge or p5."""
    hosts: int | None = None
    """Number of hosts; None takes as many as --run.workers need."""
    price: float | None = None
    """US dollars for one host and hour. None takes the price that is noted for the type."""
    images: int | None = None
    """Images or segments. None counts those of --data.train, or takes 1,281,167 (ImageNet)."""
    image_bytes: float | None = None
    """Mean bytes of an encoded image or segment. None takes those of --data.train; without it,
    110,000 for images and 500,000 for segments."""
    measure: bool = False
    """Measure on this machine what can be: the speed of training, decoding and reading (of
    --data.train), writing checkpoints, and exchanging gradients between processes."""
    constants: ReadPlace | None = None
    """JSON file of measured constants, from --save on a machine like those of the cluster."""
    save: Annotated[str, PlaceField(written=True, file=True)] | None = None
    """JSON file for what --measure has measured."""
    json: bool = False
    """Print JSON, with all constants, instead of the table."""

    def __post_init__(self) -> None:
        for flag in ("hosts", "images", "image_bytes"):
            value = getattr(self, flag)
            fits = value is None or 0 < value < math.inf
            require(fits, flag.replace("_", "-"), f"must be positive and finite, got {value}")
        fits = self.price is None or 0 <= self.price < math.inf
        require(fits, "price", f"must be finite and not negative, got {self.price}")
        require(self.save is None or self.measure, "save", "keeps what --measure measures; add it")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which runs of a recipe are made, and which are stopped early. No labels are needed."""

    space: tuple[str, ...] = ()
    """What varies: `optim.lr=log:1e-4:1e-2`, `views.colour=uniform:0:1`, or a list of choices,
    `objective.sigreg_weight=0.005,0.02,0.08`; separate several with
    spaces. A choice of several numbers is written `(0.9,0.95)`."""
    samples: int | None = None
    """Number of runs, drawn at random. None makes all combinations and needs lists of choices."""
    seed: int = 0
    """Seed of the draw. Every run has the recipe's --run.seed."""
    concurrent: int = 1
    """Number of runs at a time, each with the recipe's workers, CPUs and GPUs."""
    metric: Literal["rankme", "lidar", "none"] = "rankme"
    """Metric by which runs are stopped early (ASHA), read on fixed training samples at every
    checkpoint; `none` lets all runs finish."""
    reduction: float = 3.0
    """One in this many runs continues past each rung. The first rung is the first checkpoint, and
    each further one is this many times as late."""
    out: WrittenPlace = "sweep"
    """Folder or `s3://` prefix of the runs, the results and the plot. With the same folder again,
    the sweep makes only the missing runs."""

    def __post_init__(self) -> None:
        require(self.samples is None or self.samples > 0, "samples", "must be positive")
        require(self.concurrent > 0, "concurrent", "must be positive")
        require(self.reduction > 1, "reduction", "must be above 1")
