"""Settings of `pipelines.ingest`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipelines.config.checks import check_deep_range, parse_colour, require
from pipelines.config.places import PlaceField, ReadPlace, WrittenPlace

IMAGE_COLUMN, LABEL_COLUMN = "image", "label"


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How video is cut into segments and stored."""

    fps: float = 15.0
    """Constant frame rate of every segment; sources are resampled by their timestamps."""
    segment_seconds: float = 10.0
    """Length of a segment; the last one of a file may be shorter. A clip is drawn from one
    segment."""
    key_frame_every: int = 15
    """Frames between key frames: the most a loader decodes before the first frame it wants."""
    crf: int = 20
    """H.264 quality: 0 is lossless, 23 usual, more is smaller and worse."""
    preset: Literal["ultrafast", "veryfast", "medium", "slow"] = "veryfast"
    """H.264 encoder effort: slower is smaller at the same quality."""
    max_gap: float = 5.0
    """A frame is repeated for at most this many seconds when none follows. After a longer gap a new
    segment starts."""
    max_pixels: int = 16_777_216
    """Files with larger frames than this are quarantined, undecoded."""
    max_bytes: int = 17_179_869_184
    """Files larger than this many bytes are quarantined, unread."""
    max_seconds: float = 86_400.0
    """Files longer than this are quarantined. A file whose header says less is cut at this
    length."""

    def __post_init__(self) -> None:
        require(0 < self.fps <= 1000, "video.fps", "must be positive, at most 1000")
        require(
            round(self.fps * self.segment_seconds) >= 1,
            "video.segment-seconds",
            "must hold at least one frame",
        )
        require(self.key_frame_every > 0, "video.key-frame-every", "must be positive")
        require(0 <= self.crf <= 51, "video.crf", "must be between 0 and 51")
        for flag in ("max_gap", "max_pixels", "max_bytes", "max_seconds"):
            require(getattr(self, flag) > 0, f"video.{flag.replace('_', '-')}", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """How a live stream is opened, and how often new shards are published."""

    publish_seconds: float = 30.0
    """Seconds between published shards; a shard that reaches --shard-bytes is published sooner."""
    format: str = ""
    """FFmpeg's name of the input format, where the source does not say: `v4l2` for a
    camera."""
    options: tuple[str, ...] = ()
    """NAME=VALUE for FFmpeg: `rtsp_transport=tcp`, `framerate=30`."""
    open_seconds: float = 30.0
    """The job fails if the source cannot be opened within this many seconds at the start."""
    read_seconds: float = 10.0
    """Reconnect after this many seconds without video."""
    backoff_seconds: float = 1.0
    """Seconds to wait before reconnecting; doubled after every failure."""
    most_backoff_seconds: float = 30.0
    """Longest wait before reconnecting, in seconds."""
    end_seconds: float = 600.0
    """The stream counts as ended after this many seconds without video, reconnects included."""

    def __post_init__(self) -> None:
        for flag in ("publish", "open", "read", "backoff", "most_backoff", "end"):
            value = getattr(self, f"{flag}_seconds")
            require(value > 0, f"live.{flag.replace('_', '-')}-seconds", "must be positive")
        shorter = self.backoff_seconds <= self.most_backoff_seconds
        require(shorter, "live.backoff-seconds", "must not be over --live.most-backoff-seconds")
        for option in self.options:
            name, equals, _ = option.partition("=")
            require(bool(name and equals), "live.options", f"{option!r} is not NAME=VALUE")


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Turns raw images or videos of any source into validated Parquet shards."""

    source: Annotated[str, PlaceField(unless="follow")]
    """Folder, `s3://` prefix or list (CSV, TSV, text, JSON lines) of images or videos; for images
    also a WebDataset tar (or a folder or glob of them), or a Parquet file or folder. With --follow
    one live stream: a URL or device that FFmpeg opens, a file that grows, a named pipe, or `-`."""
    out: WrittenPlace
    """Where shards, manifest and quarantine go: a local folder or an `s3://` prefix."""
    format: Literal["auto", "folder", "list", "webdataset", "parquet"] = "auto"
    """How to read `source`; `auto` decides by the file names found there."""
    modality: Literal["auto", "image", "video"] = "auto"
    """How to treat the files; `auto` decides by their names (a source of GIFs only is images)."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """How video is cut and stored."""
    image_column: str = "image"
    """Parquet sources: the column of encoded bytes, of Hugging Face's `{bytes, path}` structs, of
    paths, or of lists of these. `image.bytes` is a field of a struct. Lists: the column of paths,
    if it has none of the usual names."""
    label_column: str | None = None
    """Parquet sources and lists: the column of labels, or the key of folders named KEY=VALUE. The
    default is `label` (in lists one of the usual names). Files without the column are
    unlabelled."""
    image_member: tuple[str, ...] = ()
    """Tars with several pictures per sample: take those whose names end in `.` and one of these,
    such as `jpg` or `seg.png`."""
    class_level: int | None = None
    """Folders: which folder above a file is its class: 1 is the first below the source, -1 the
    file's own, 0 none. The default is the file's own folder, or the one above if all of these have
    names such as `images` or `train`."""
    classes: ReadPlace = ""
    """Fixes the classes and their order, as a test set needs those of its training set: a text file
    with one name per line, or an ingested set (its folder or manifest.json). Items with other
    labels are left out."""
    follow: bool = False
    """`source` is a live stream: publish shards until it ends or the job receives SIGTERM."""
    live: LiveConfig = field(default_factory=LiveConfig)
    """How a live stream is opened and published."""
    short_side: int | None = None
    """Resize so that the short side has this many pixels (never enlarges) and re-encode. Video is
    always re-encoded, and its sides are rounded to even numbers."""
    encode: Literal["keep", "jpeg", "png", "webp"] = "keep"
    """Re-encode as this; `keep` stores the bytes as they came unless resizing, EXIF rotation or an
    unusual colour mode makes re-encoding necessary."""
    quality: int = 95
    """JPEG and WebP quality when re-encoding."""
    background: str = "black"
    """Colour that fills the transparent parts of images: `black`, `white`, `R,G,B` (0 to 255 each)
    or `#rrggbb`. Encoders trained on the set use the same colour when they serve."""
    deep_range: int | Literal["auto"] = 65535
    """Value of white in 16-bit images whose file does not state it, such as 4095 for 12-bit data
    from X-rays and microscopes. `auto` takes, for each image, the smallest bit depth (8, 10, 12, 14
    or 16) that holds its brightest value."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are quarantined as decompression bombs, undecoded."""
    max_bytes: int = 67_108_864
    """Images larger than this many bytes are quarantined, unread."""
    shard_bytes: int = 134_217_728
    """Aim for shards of this many bytes."""
    row_group_rows: int = 64
    """Rows in one Parquet row group: the smallest unit a loader reads."""

    def __post_init__(self) -> None:
        for flag in ("source", "out", "classes"):  # what lies below them may have any name
            foreign = any("\ud800" <= letter <= "\udfff" for letter in getattr(self, flag))
            way_out = "give the folder above it, or a link to it"
            require(not foreign, flag, f"{getattr(self, flag)!a} is not UTF-8: {way_out}")
        for pattern in self.image_member:
            names_one = bool(pattern.strip("*. ")) and "/" not in pattern
            require(names_one, "image-member", f"{pattern!r} is no ending of names, as jpg is")
        require(self.short_side is None or self.short_side >= 8, "short-side", "must be at least 8")
        require(1 <= self.quality <= 100, "quality", "must be between 1 and 100")
        parse_colour("background", self.background)
        check_deep_range("deep-range", self.deep_range)
        require(self.max_pixels > 0, "max-pixels", "must be positive")
        require(self.max_bytes > 0, "max-bytes", "must be positive")
        require(self.shard_bytes >= 1024, "shard-bytes", "must be at least 1024")
        require(self.row_group_rows > 0, "row-group-rows", "must be positive")
        if self.follow:
            require(self.modality != "image", "modality", "--follow takes videos only")
            require(not self.classes, "classes", "goes without --follow: streams have no labels")
            require(self.format == "auto", "format", "goes without --follow (see --live.format)")
