"""Clips of long videos: our loader on ingested shards, against what is written without it.

    # minutes
    python benchmarks/data/decode.py --film bigbuckbunny.mp4 --work /tmp/decode-bench --prepare
    python benchmarks/data/decode.py --film bigbuckbunny.mp4 --work /tmp/decode-bench  # timed

Sources: 8 MP4 files of 60 seconds, the film's own packets repeated (its encoding, a key frame each
time it begins anew), and the same at short side 256 as ffmpeg makes them by default (H.264, a key
frame every 250 frames). A clip is 16 frames, every fourth one of 25 a second, from a random place,
cropped at random to 224x224. Every variant runs in processes of its own on 2 workers. CPU seconds
are those of the process tree, from one batch to a later one, with as many under way at both ends.

    ours        `pipelines.loading.loader.train_batches` on shards of those files
                (short side 256, 25 frames/s, otherwise its defaults): crops, masks, ids
    whole       torch DataLoader; decodes the whole file for every clip (as decord does)
    seek        torch DataLoader; PyAV seeks to the key frame before the clip and decodes to its end
    whole-256, seek-256   the same on the files of short side 256
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.data.loader import tree_cpu_seconds  # noqa: E402

FILES, SECONDS, RATE = 8, 60, 25
FRAMES, STRIDE, SIDE, SHORT_SIDE, WORKERS = 16, 4, 224, 256, 2
SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)
VARIANTS = {  # clips a batch, batches before, measured, and behind
    "ours": (16, 3, 12, 4),
    "whole": (2, 2, 6, 2),
    "seek": (2, 4, 24, 2),
    "whole-256": (2, 4, 24, 2),
    "seek-256": (2, 4, 48, 2),
}


# --- sources


def repeat(film: Path, target: Path, title: str) -> None:
    """The film's packets again and again, without encoding anything."""
    with av.open(str(film)) as source, av.open(str(target), "w") as out:
        out.metadata["title"] = title  # no two files are the same
        video = source.streams.video[0]
        stream = out.add_stream_from_template(video)
        length = round(video.frames / video.average_rate / video.time_base)
        shift = 0
        while shift * video.time_base < SECONDS:
            source.seek(0)
            for packet in source.demux(video):
                if packet.size:
                    packet.pts += shift
                    packet.dts += shift
                    packet.stream = stream
                    out.mux(packet)
            shift += length


def shrink(source: Path, target: Path) -> None:
    """What `ffmpeg -vf scale=-2:256 -c:v libx264 -crf 20 -preset veryfast` makes."""
    with av.open(str(source)) as file, av.open(str(target), "w") as out:
        video = file.streams.video[0]
        stream = out.add_stream("libx264", rate=RATE)
        stream.height = SHORT_SIDE
        stream.width = round(video.width * SHORT_SIDE / video.height / 2) * 2
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "20", "preset": "veryfast"}
        for frame in file.decode(video):
            small = frame.reformat(stream.width, stream.height, interpolation="BICUBIC")
            out.mux(stream.encode(small))
        out.mux(stream.encode(None))


def prepare(film: Path, work: Path) -> None:
    """Files and shards; prints what ingest costs."""
    for folder in ("files", "files-256"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        repeat(film, work / "files" / f"{number}.mp4", f"copy {number}")
    small = work / "small.mp4"
    shrink(work / "files" / "0.mp4", small)
    for number in range(FILES):
        (work / "files-256" / f"{number}.mp4").write_bytes(small.read_bytes())
    before = tree_cpu_seconds()
    command = ["-m", "pipelines.ingest", "--source", str(work / "files"), "--out"]
    command += [str(work / "shards"), "--short-side", str(SHORT_SIDE), "--video.fps", str(RATE)]
    process, spent = subprocess.Popen([sys.executable, *command], cwd=ROOT), 0.0
    while process.poll() is None:  # of processes that end without being waited for, only this tells
        spent = max(spent, tree_cpu_seconds())
        time.sleep(0.1)
    print(f"ingest: {spent - before:.0f} CPU s for {FILES * SECONDS} s of footage")


# --- one variant, in a process of its own


def measure(variant: str, work: Path) -> dict[str, float]:
    """Clips a CPU second and a second."""
    import torch

    torch.set_num_threads(1)
    batch, before, count, behind = VARIANTS[variant]
    total = before + count + behind
    batches = _ours(work, batch, total) if variant == "ours" else _theirs(variant, work, total)
    for index, shape in enumerate(batches):
        assert shape == (batch, FRAMES, 3, SIDE, SIDE), shape
        if index == before - 1:
            wall, cpu = time.monotonic(), tree_cpu_seconds()
        if index == before + count - 1:
            wall, cpu = time.monotonic() - wall, tree_cpu_seconds() - cpu
    return {"clips_per_cpu_s": batch * count / cpu, "clips_per_s": batch * count / wall}


def _ours(work: Path, batch: int, total: int) -> Iterator[tuple[int, ...]]:
    import ray

    from pipelines.config.data import ClipConfig, DataConfig
    from pipelines.config.objectives import ObjectiveConfig
    from pipelines.config.train import ModelConfig, PretrainConfig
    from pipelines.loading.loader import train_batches

    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=WORKERS, include_dashboard=False)
    data = DataConfig(
        train=str(work / "shards"),
        batch_size=batch,
        crop_scale=SCALE,
        crop_ratio=RATIO,
        shuffle_window=64,
        decode_threads=WORKERS,
    )
    model = ModelConfig(encoder="video_b", image_size=SIDE, patch_size=16, frames=FRAMES, tubelet=2)
    objective = ObjectiveConfig(name="vjepa", loss="l1")
    clip = ClipConfig(stride=STRIDE)
    cfg = PretrainConfig(data=data, model=model, clip=clip, objective=objective)
    for step in train_batches(cfg, rank=0, world_size=1, start_step=0, end_step=total):
        yield tuple(step["clips"].movedim(2, 1).shape)
    ray.shutdown()


class Clips:
    """What a torch user writes."""

    def __init__(self, files: list[Path], whole: bool):
        from torchvision.transforms import InterpolationMode, v2

        self.files, self.whole = files, whole
        bicubic = InterpolationMode.BICUBIC
        self.crop = v2.RandomResizedCrop(SIDE, SCALE, RATIO, interpolation=bicubic, antialias=True)

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index: int):
        import torch

        rng = np.random.default_rng(index)
        first = int(rng.integers(SECONDS * RATE - (FRAMES - 1) * STRIDE))
        wanted = range(first, first + FRAMES * STRIDE, STRIDE)
        with av.open(str(self.files[rng.integers(len(self.files))])) as file:
            frames = self._frames(file, wanted)
        return self.crop(torch.from_numpy(np.stack(frames)).movedim(-1, 1))

    def _frames(self, file, wanted: range) -> list[np.ndarray]:
        stream = file.streams.video[0]
        stream.thread_count = 1  # the workers are the parallelism
        if not self.whole:
            origin = stream.start_time or 0
            file.seek(origin + int(wanted[0] / RATE / stream.time_base), stream=stream)
        found = {}
        for frame in file.decode(stream):
            number = round((frame.pts - (stream.start_time or 0)) * stream.time_base * RATE)
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
            if not self.whole and number >= wanted[-1]:
                break
        return [found[number] for number in wanted]


def _theirs(variant: str, work: Path, total: int) -> Iterator[tuple[int, ...]]:
    import torch

    folder = work / ("files-256" if variant.endswith("-256") else "files")
    clips = Clips(sorted(folder.glob("*.mp4")), variant.startswith("whole"))
    batch = VARIANTS[variant][0]
    sampler = range(total * batch)
    loader = torch.utils.data.DataLoader(
        clips, batch_size=batch, sampler=sampler, num_workers=WORKERS, prefetch_factor=1
    )
    for images in loader:
        yield tuple(images.shape)


# --- all of them


def compare(work: Path) -> None:
    print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
    results = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--work", str(work), "--variant", variant]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        results[variant] = json.loads(done.stdout.strip().splitlines()[-1])
        print(variant, results[variant], flush=True)
    ours = results["ours"]["clips_per_cpu_s"]
    print("\n| variant | clips/CPU-s | frames/CPU-s | clips/s | frames/s | ours against it, CPU |")
    print("|---|---|---|---|---|---|")
    for variant, found in results.items():
        cpu, wall = found["clips_per_cpu_s"], found["clips_per_s"]
        figures = (cpu, cpu * FRAMES, wall, wall * FRAMES)
        print(
            f"| {variant} | " + " | ".join(f"{v:.2f}" for v in figures) + f" | {ours / cpu:.1f} |"
        )
    print(f"\nload average {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--film", type=Path, help="see `pipelines.fetch samples`")
    parser.add_argument("--work", type=Path, required=True, help="files and shards, kept")
    parser.add_argument("--prepare", action="store_true", help="make them, and stop")
    parser.add_argument("--variant", choices=VARIANTS, help="measure one")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.work)))
    elif options.prepare:
        prepare(options.film, options.work)
    else:
        compare(options.work)


if __name__ == "__main__":
    main()
