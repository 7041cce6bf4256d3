"""Settings of the training data: shards, crops, clips and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.config.checks import require, require_range
from pipelines.config.places import ReadPlace


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards to train on and how a batch is made of them."""

    train: ReadPlace = ""
    """Folder or `s3://` prefix of ingested shards to pretrain on."""
    mix: tuple[ReadPlace, ...] = ()
    """Further sets of shards that every batch has rows of, beside `train`."""
    mix_shares: tuple[float, ...] = ()
    """Share of each set of `mix` in every batch, rounded to whole rows of a lane; `train` has the
    rest. Every set is gone through in its own epochs."""
    published: tuple[int, ...] = ()
    """Number of shards that are read of `train` and of each set of `mix`, 0 for all; empty reads
    all of all sets. Of a live stream's set, which may grow, a run reads what was published when it
    began: it fills this in by itself, and a resumed run takes it over."""
    test: ReadPlace = ""
    """Labelled shards held out for the online probe; empty skips the
    probe."""
    batch_size: int = 256
    """Images or clips in one optimizer step, over all workers and accumulation steps."""
    lanes: int = 8
    """Independent streams that make up a global batch: worker r of W reads lanes [r*L/W,
    (r+1)*L/W). The data that a run sees depends on this, never on the number of workers, which must
    divide it."""
    shuffle_window: int = 1024
    """Rows of one lane shuffled together, on top of the permutation of row groups."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Area range of the random resized crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crop's aspect ratio, width by height, relative to that of what the input shows
    of the picture."""
    flip: bool = False
    """Flip half of the images or clips left-right (V-JEPA does, I-JEPA does not)."""
    decode_in: Literal["trainer", "data"] = "trainer"
    """Where images are decoded: threads beside the device (one host), or Ray Data tasks (clusters
    with spare CPU nodes, which then ship uint8 crops)."""
    decode_threads: int = 2
    """Decoder threads per worker when `decode_in` is `trainer`."""
    prefetch_batches: int = 4
    """Number of batches that are prepared ahead of the training step."""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "data.batch-size", "must be positive")
        require(self.lanes > 0, "data.lanes", "must be positive")
        require(
            self.batch_size % self.lanes == 0,
            "data.batch-size",
            f"must be a multiple of --data.lanes ({self.lanes}), got {self.batch_size}",
        )
        self._check_mix()
        require(self.shuffle_window > 0, "data.shuffle-window", "must be positive")
        require_range(self.crop_scale, "data.crop-scale", 0.0, 1.0)
        require_range(self.crop_ratio, "data.crop-ratio", 0.0, 10.0)
        require(self.decode_threads > 0, "data.decode-threads", "must be positive")
        require(self.prefetch_batches > 0, "data.prefetch-batches", "must be positive")

    def _check_mix(self) -> None:
        shares = self.mix_shares
        require(len(shares) == len(self.mix), "data.mix-shares", "needs one for each --data.mix")
        require(all(s > 0 for s in shares) and sum(shares) < 1, "data.mix-shares",
                "must be positive, and leave some of the batch to --data.train")  # fmt: skip
        uris = (self.train, *self.mix)
        counts = self.published
        ok = len(counts) in (0, len(uris)) and all(count >= 0 for count in counts)
        require(ok, "data.published", f"needs {len(uris)} numbers of shards, or none")
        require(len(set(uris)) == len(uris), "data.mix", "names a set twice")
        rows = self.batch_size // self.lanes
        require(
            self.rows_by_set[0] > 0,
            "data.mix-shares",
            f"a lane has {rows} rows of a batch, too few for {len(uris)} sets; raise "
            "--data.batch-size or lower --data.lanes",
        )

    @property
    def rows_by_set(self) -> tuple[int, ...]:
        """Rows of a batch that come from `train` and from each set of `mix`."""
        lane_rows = self.batch_size // self.lanes
        mixed = [max(1, round(share * lane_rows)) for share in self.mix_shares]
        return tuple(self.lanes * rows for rows in (lane_rows - sum(mixed), *mixed))


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
    """Context tokens kept per image, constant through the run. None takes a share of the grid that
    92 to 98% of the draws reach; the others are drawn again."""
    hidden: float = 0.75
    """mae: share of the patches that is hidden, drawn at random patch by patch."""
    contexts: int = 4
    """dmjd: number of contexts of an image. Each predicts its own share of the patches, together
    they predict the whole image, and each sees `context_keep` of the other patches (None: all)."""
    truncate: Literal["random", "legacy"] = "random"
    """`random` keeps a random subset of fixed size; `legacy` reproduces the original: one block
    size a batch, scale and ratio from one draw, last row and column never reached, every list cut
    to the batch's shortest in raster order."""

    def __post_init__(self) -> None:
        require(self.num_targets > 0, "mask.num-targets", "must be positive")
        require_range(self.target_scale, "mask.target-scale", 0.0, 1.0)
        require_range(self.target_ratio, "mask.target-ratio", 0.0, 10.0)
        require_range(self.context_scale, "mask.context-scale", 0.0, 1.0)
        keep = self.context_keep
        require(keep is None or keep > 0, "mask.context-keep", "must be positive")
        require(0 < self.hidden < 1, "mask.hidden", "must lie between 0 and 1")
        require(self.contexts >= 2, "mask.contexts", "must be at least 2")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which frames of a stored segment make up a clip. `model.frames` says how many there are."""

    fps: float | None = None
    """Frames per second of the clip, whatever the rate of the segment; None uses `stride`
    instead."""
    stride: int = 1
    """Distance between two frames of the clip, in frames of the segment."""
    jitter: bool = True
    """Start at a random frame of the segment, drawn anew in every epoch. Otherwise take the middle
    of the segment, as evaluation always does."""

    def __post_init__(self) -> None:
        require(self.fps is None or self.fps > 0, "clip.fps", "must be positive")
        require(self.stride > 0, "clip.stride", "must be positive")
        require(self.fps is None or self.stride == 1, "clip.stride", "goes without --clip.fps")


@dataclass(frozen=True, kw_only=True)
class VideoMaskConfig:
    """V-JEPA's masks of clips (Bardes et al. 2024, section 3.2 and appendix B).

    One entry of `blocks`, `scale` and `temporal_scale` is one generator: every clip is masked once
    by each, with a mask token of its own, and all share one pass of the target encoder.
    """

    kind: Literal["blocks", "tube"] = "blocks"
    """`blocks` hides the union of several blocks; `tube` hides the same random patches in all
    frames."""
    blocks: tuple[int, ...] = (8, 2)
    """Number of blocks of each generator. V-JEPA has 8 small ones (short range) and 2 large ones
    (long range)."""
    scale: tuple[float, ...] = (0.15, 0.7)
    """Area of each generator's blocks, as a fraction of the patch grid."""
    ratio: tuple[float, float] = (0.75, 1.5)
    """Aspect-ratio range of all blocks."""
    temporal_scale: tuple[float, ...] = (1.0, 1.0)
    """Duration of each generator's blocks, as a fraction of the clip; 1 as in V-JEPA."""
    tube_ratio: float = 0.9
    """Share of the patches that `tube` hides."""
    truncate: Literal["random", "legacy"] = "random"
    """`random` keeps random subsets of fixed size; `legacy` reproduces the original: one block size
    a batch, every list cut to the batch's shortest from its end, which is the end of the clip."""

    def __post_init__(self) -> None:
        for flag in ("scale", "temporal_scale"):
            values, name = getattr(self, flag), f"video-mask.{flag.replace('_', '-')}"
            require(len(values) == len(self.blocks), name, "needs as many as --video-mask.blocks")
            require(all(0 < v <= 1 for v in values), name, "must lie in (0, 1]")
        ok = len(self.blocks) > 0 and min(self.blocks) > 0
        require(ok, "video-mask.blocks", "must be positive")
        require_range(self.ratio, "video-mask.ratio", 0.0, 10.0)
        require(0 < self.tube_ratio < 1, "video-mask.tube-ratio", "must lie between 0 and 1")

    @property
    def generators(self) -> int:
        """Masks of one clip, and mask tokens of the predictor."""
        return len(self.blocks) if self.kind == "blocks" else 1
