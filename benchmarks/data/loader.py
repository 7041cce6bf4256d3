"""Data path: our Ray Data loader against a torch DataLoader on the same JPEGs, 500x400 to 224x224.

    python benchmarks/data/loader.py                      # 3,000 images, 3 rounds, about 5 minutes
    python benchmarks/data/loader.py --images 500 --rounds 1 --work /tmp/loader-bench

The images are made at the start: cuts of a real photo (matplotlib's sample picture), turned,
mirrored and blended with enlarged CIFAR-10 pictures, JPEG quality 90; no two are alike. Every
variant runs in processes of its own, in turns, so that what else the machine does hits all alike.
It walks through three epochs without a pause and the second is measured: both ends of the
measurement have the same number of batches ready. CPU seconds are those of the whole process tree
(Ray's own processes and DataLoader's workers included); quote them first, wall time needs a quiet
machine.

    ray-trainer  `pipelines.loading.loader.train_batches`, decode_in="trainer" (crops, masks, ids)
    ray-data     the same with decode_in="data"
    torch-trainer, torch-data
                 the same batches through Ray's `iter_torch_batches`, whose threads decode and
                 prefetch; only with --variant, compared in loader.md
    dataloader   torch DataLoader, 2 workers, torchvision decode_jpeg and RandomResizedCrop(224)
                 on disk; no masks, so it does a little less work
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
VARIANTS = ("ray-trainer", "ray-data", "dataloader")
BY_NAME = (*VARIANTS, "torch-trainer", "torch-data")
BATCH, WORKERS, SIDE = 128, 2, 224
SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)


# --- images


def make_photos(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    photo, small = _photo(), _cifar(count)
    for index in range(count):
        rng = np.random.default_rng(index)
        turned = photo.rotate(90 * int(rng.integers(4)), expand=True)
        left = int(rng.integers(turned.width - 500 + 1))
        top = int(rng.integers(turned.height - 400 + 1))
        cut = turned.crop((left, top, left + 500, top + 400))
        if rng.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        other = small[index % len(small)].resize((500, 400), Image.Resampling.BICUBIC)
        Image.blend(cut, other, rng.uniform(0.1, 0.5)).save(folder / f"{index:05d}.jpg", quality=90)


def _photo() -> Image.Image:
    import matplotlib as mpl

    path = Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")  # 512 x 600


def _cifar(count: int) -> list[Image.Image]:
    found: list[Image.Image] = []
    with tarfile.open(ROOT / "pipelines" / "sample" / "cifar10.tar.gz") as archive:
        for member in archive:
            if member.name.endswith(".png") and len(found) < count:
                data = archive.extractfile(member).read()
                found.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return found


# --- CPU seconds of a process tree, from /proc


def tree_cpu_seconds() -> float:
    """User and system time of this process, its descendants, and the children they waited for."""
    parents, times = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(fields[1])
            times[int(entry.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return sum(times[pid] for pid in times if _descends(pid, parents))


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = parents.get(pid, 0)
    return False


# --- one variant, in a process of its own


def measure(variant: str, work: Path) -> dict[str, float]:
    """Images a second and a CPU second over the second of three epochs."""
    import torch

    torch.set_num_threads(1)
    files = sorted((work / "photos").glob("*.jpg"))
    per_epoch = len(files) // BATCH
    batches = (
        _dataloader(files, per_epoch) if variant == "dataloader" else _ray(variant, work, per_epoch)
    )
    started = time.monotonic()
    for index, shape in enumerate(batches):
        assert shape == (BATCH, 3, SIDE, SIDE)
        if index == 0:
            first = time.monotonic() - started
        if index == per_epoch - 1:
            wall, cpu = time.monotonic(), tree_cpu_seconds()
        if index == 2 * per_epoch - 1:
            wall, cpu = time.monotonic() - wall, tree_cpu_seconds() - cpu
    images = per_epoch * BATCH
    return {"images_per_s": images / wall, "images_per_cpu_s": images / cpu, "first_batch_s": first}


def _ray(variant: str, work: Path, per_epoch: int) -> Iterator[tuple[int, ...]]:
    import ray

    from pipelines.config.data import DataConfig
    from pipelines.config.train import ModelConfig, PretrainConfig
    from pipelines.loading.loader import train_batches

    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=WORKERS, include_dashboard=False)
    data = DataConfig(
        train=str(work / "shards"),
        batch_size=BATCH,
        crop_scale=SCALE,
        crop_ratio=RATIO,
        decode_in=variant.partition("-")[2],
        decode_threads=WORKERS,
    )
    cfg = PretrainConfig(data=data, model=ModelConfig(image_size=SIDE, patch_size=16))
    make = train_batches if variant.startswith("ray-") else torch_batches
    for batch in make(cfg, rank=0, world_size=1, start_step=0, end_step=3 * per_epoch):
        yield tuple(batch["images"].shape)
    ray.shutdown()


def torch_batches(cfg, *, rank: int, world_size: int, start_step: int, end_step: int) -> Iterator:
    """The batches of `train_batches`, by `iter_torch_batches` instead of our thread."""
    from ray.data.collate_fn import ArrowBatchCollateFn

    from pipelines.loading import loader

    class Collate(ArrowBatchCollateFn):
        def __call__(self, batch):
            return loader.to_batch(cfg, reader, batch, batch.column("step")[0].as_py(), pool)

    reader = loader.make_reader(cfg, rank, world_size)
    todo = list(loader.iter_pieces(reader.plan, start_step, end_step, reader.most_batches))
    share = loader.cluster_share(cfg, world_size)
    with ThreadPoolExecutor(cfg.data.decode_threads) as pool:
        for first in range(0, len(todo), loader.SEGMENT_PIECES):
            segment = todo[first : first + loader.SEGMENT_PIECES]
            batches = (
                loader._dataset(cfg, reader, segment, share)
                .iterator()
                .iter_torch_batches(
                    batch_size=reader.local_batch,
                    prefetch_batches=cfg.data.prefetch_batches,
                    collate_fn=Collate(),
                    device="cpu",
                )
            )
            with contextlib.closing(iter(batches)) as batches, loader._plain_errors():
                yield from batches


class Photos:
    """What a torch user writes: read the file, decode, crop."""

    def __init__(self, files: list[Path]):
        from torchvision.transforms import InterpolationMode, v2

        self.files = files
        bicubic = InterpolationMode.BICUBIC
        self.crop = v2.RandomResizedCrop(SIDE, SCALE, RATIO, interpolation=bicubic, antialias=True)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int):
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        return self.crop(decode_jpeg(read_file(str(self.files[index])), ImageReadMode.RGB))


def _dataloader(files: list[Path], per_epoch: int) -> Iterator[tuple[int, ...]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    order = [torch.randperm(len(files), generator=generator)[: per_epoch * BATCH] for _ in range(3)]
    loader = torch.utils.data.DataLoader(
        Photos(files), batch_size=BATCH, sampler=torch.cat(order).tolist(), num_workers=WORKERS
    )
    for images in loader:
        yield tuple(images.shape)


# --- all of them


def prepare(work: Path, images: int) -> None:
    """Photos and their shards; what is there already is kept."""
    photos = work / "photos"
    if not photos.is_dir() or len(list(photos.glob("*.jpg"))) != images:
        make_photos(photos, images)
    command = ["-m", "pipelines.ingest", "--source", str(photos), "--out", str(work / "shards")]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def run_variant(variant: str, work: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", str(work), "--variant", variant]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(work: Path, images: int, rounds: int) -> None:
    prepare(work, images)
    sizes = [path.stat().st_size for path in (work / "photos").glob("*.jpg")]
    print(f"{images} JPEGs, mean {np.mean(sizes) / 1024:.0f} KiB; load {os.getloadavg()[0]:.1f}")
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for turn in range(rounds):
        for variant in VARIANTS:
            results[variant].append(run_variant(variant, work))
            print(f"round {turn + 1} {variant}: {results[variant][-1]}", flush=True)
    base = np.median([result["images_per_cpu_s"] for result in results["dataloader"]])
    print("\n| variant | images/CPU-s | against DataLoader | images/s | first batch, s |")
    print("|---|---|---|---|---|")
    for variant, found in results.items():
        cpu, wall, first = (
            np.median([result[key] for result in found])
            for key in ("images_per_cpu_s", "images_per_s", "first_batch_s")
        )
        print(f"| {variant} | {cpu:.0f} | {cpu / base:.2f} | {wall:.0f} | {first:.2f} |")
    print(f"\nload average at the end: {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="kept; default: a temporary folder, removed")
    parser.add_argument("--variant", choices=BY_NAME, help="measure one, on a prepared --work")
    options = parser.parse_args()
    if options.images < BATCH:
        parser.error(f"--images: at least one batch of {BATCH}")
    if options.variant:
        print(json.dumps(measure(options.variant, options.work)))
        return
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as temporary:
        compare(options.work or Path(temporary), options.images, options.rounds)


if __name__ == "__main__":
    main()
