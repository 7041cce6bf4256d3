"""Our decoding of stored pictures and segments against torchcodec's: speed and pixels, one thread.

    python -m pipelines.fetch samples --out FILMS
    python benchmarks/data/against_torchcodec.py --films FILMS/*.mp4 --pictures DIR

It needs `pip install torchcodec`. Both decoders work in turns on every item, so that what else the
machine does hits both alike. CPU seconds are those of the process.

The films are made into segments by the code of ingest (short side 256, 25 frames a second, a key
frame every 15). A clip is 16 frames, every fourth one from a random place; both get the encoded
segment and the numbers of the frames, and return RGB. Pictures are all JPEG and PNG files under a
folder; of them, only the decoding operators are compared. (`loader.py --work DIR` makes some.)

torchcodec loads the FFmpeg of the system. Where there is none, those that PyAV brings can be
linked to their usual names in a folder of LD_LIBRARY_PATH.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.io  # noqa: F401  registers torch.ops.image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
FRAMES, STRIDE = 16, 4
Decoders = dict[str, Callable[..., np.ndarray]]


# --- pictures


def pictures_of(folder: Path) -> list[tuple[torch.Tensor]]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    return [(torch.from_numpy(np.fromfile(path, np.uint8)),) for path in files]


def picture_decoders() -> Decoders:
    from torchcodec.decoders import decode_image

    def torchvision_operator(encoded: torch.Tensor) -> np.ndarray:
        ops, is_jpeg = torch.ops.image, bytes(encoded[:2].numpy()) == b"\xff\xd8"
        return (ops.decode_jpeg if is_jpeg else ops.decode_png)(encoded, 0, True).numpy()

    def torchcodec(encoded: torch.Tensor) -> np.ndarray:
        return decode_image(encoded, mode="UNCHANGED").numpy()

    return {"torchvision's operator (ours)": torchvision_operator, "torchcodec": torchcodec}


# --- clips


def clips_of(films: list[Path], count: int) -> list[tuple[bytes, list[int]]]:
    """Returns clips: an encoded segment and the numbers of frames of it."""
    from pipelines.config.ingest import IngestConfig, VideoConfig
    from pipelines.ingestion.preparing.videos import prepare_video
    from pipelines.ingestion.reading.items import Item

    cfg = IngestConfig(source="films", out="shards", short_side=256, video=VideoConfig(fps=25))
    items = [Item(uri=str(film), path=str(film)) for film in films]
    rows = [row for item in items for row in prepare_video(item, cfg, [])]
    length = (FRAMES - 1) * STRIDE + 1
    long = [row for row in rows if row["num_frames"] >= length]
    rng, clips = np.random.default_rng(0), []
    for which in rng.integers(len(long), size=count).tolist():
        first = int(rng.integers(long[which]["num_frames"] - length + 1))
        clips.append((long[which]["video"], [*range(first, first + length, STRIDE)]))
    return clips


def clip_decoders() -> Decoders:
    from torchcodec.decoders import VideoDecoder

    from models.media.videos import decode_frames

    def torchcodec(mode: str) -> Callable[..., np.ndarray]:
        def decode(segment: bytes, numbers: list[int]) -> np.ndarray:
            options: Any = {"num_ffmpeg_threads": 1, "seek_mode": mode, "dimension_order": "NHWC"}
            return VideoDecoder(segment, **options).get_frames_at(numbers).data.numpy()

        return decode

    modes = ("exact", "approximate")
    return {"ours": decode_frames, **{f"torchcodec, {mode}": torchcodec(mode) for mode in modes}}


# --- both


def report(what: str, decoders: Decoders, items: Sequence[Any], rounds: int, of: int = 1) -> None:
    """Prints frames per CPU second, median (lowest to highest), and how far pixels differ."""
    spent, gaps = np.zeros((len(decoders), rounds)), np.zeros((len(decoders), len(items)))
    for turn in range(rounds):
        for place, item in enumerate(items):
            made = []
            for index, decode in enumerate(decoders.values()):
                start = time.process_time()
                made.append(decode(*item))
                spent[index, turn] += time.process_time() - start
            gaps[:, place] = [np.abs(pixels.astype(np.int16) - made[0]).mean() for pixels in made]
    print(f"\n| {what} | a CPU second | ours against it | mean difference, levels | equal |")
    print("|---|---|---|---|---|")
    rates = of * len(items) / spent
    for name, rate, ratio, gap in zip(decoders, rates, rates[0] / rates, gaps, strict=True):
        print(
            f"| {name} | {np.median(rate):.0f} ({rate.min():.0f} to {rate.max():.0f}) | "
            f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) | "
            f"{gap.mean():.2f} | {np.mean(gap == 0):.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--films", type=Path, nargs="*", default=[])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.1f}")
    if options.films:
        clips = clips_of(options.films, options.clips)
        report("frames of clips", clip_decoders(), clips, options.rounds, FRAMES)
    if options.pictures:
        pictures = pictures_of(options.pictures)
        report(f"{len(pictures)} pictures", picture_decoders(), pictures, options.rounds)


if __name__ == "__main__":
    main()
