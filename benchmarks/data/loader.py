"""Data path: our Ray Data loader against what is written without it, 500x400 JPEGs to 224x224.

    python benchmarks/data/loader.py                      # 3 rounds, about 6 minutes
    python benchmarks/data/loader.py --rounds 1 --variants ray-data dataloader --work /tmp/bench

The images are made at the start: cuts of a real photo (matplotlib's sample picture), turned,
mirrored and blended with enlarged CIFAR-10 pictures, JPEG quality 90; no two are alike. Every
variant runs in processes of its own, in turns, so that what else the machine does hits all alike.

CPU seconds are those of the whole process tree: Ray's own processes, its readers and DataLoader's
workers too. They are taken of two runs, of `SHORT` and of `LONG` epochs, from the start of the
process to the last batch, and the difference is charged to the images between. So the start of a
run cancels, and every image pays for its reading: readers run epochs ahead of the trainer, and
whatever is measured between two batches of one run leaves out what they did before. (A short run of
a single step would not do: our trainer reads the first 5,000 of these images itself, so such a run
has no readers whose start could be taken off.) Images a second are from the end of epoch `SHORT` to
the last batch of the long run.

    ray-trainer  `pipelines.loading.loader.train_batches`, decode_in="trainer" (crops, masks, ids)
    ray-data     the same with decode_in="data"
    torch-trainer, torch-data
                 the same batches through Ray's `iter_torch_batches`, whose threads decode
    dataloader   torch DataLoader, 2 workers, torchvision decode_jpeg and RandomResizedCrop(224)
                 on disk; no masks, so it does a little less work
    threads      2 bare threads that call the decoder's and the resizing operator directly; a box
                 is drawn by numpy; nothing else: what decoding costs at the least
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
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
VARIANTS = ("ray-trainer", "dataloader", "threads")
BY_NAME = (*VARIANTS, "ray-data", "torch-trainer", "torch-data")
SHORT, LONG = 6, 22
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
    return sum(tree_cpu_by_part().values())


def tree_cpu_by_part() -> dict[str, float]:
    """The same: of this process, of Ray's workers (readers), and of all other descendants."""
    parents, names, times = {}, {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                start, _, rest = (entry / "stat").read_text().rpartition(")")
            except OSError:  # it has just ended
                continue
            pid, fields = int(entry.name), rest.split()
            parents[pid], names[pid] = int(fields[1]), start.partition("(")[2]
            times[pid] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    parts = {"trainer": 0.0, "readers": 0.0, "rest": 0.0}
    for pid in times:
        if _descends(pid, parents):
            is_reader = names[pid].startswith(("ray::IDLE", "ray::Map"))
            part = "trainer" if pid == os.getpid() else "readers" if is_reader else "rest"
            parts[part] += times[pid]
    return parts


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = parents.get(pid, 0)
    return False


# --- one variant, in a process of its own


def measure(variant: str, work: Path, epochs: int) -> dict[str, Any]:
    """CPU seconds of the process tree from its start, and seconds by the clock."""
    import torch
    import torchvision.io  # noqa: F401  before the clock runs, for all alike

    torch.set_num_threads(1)
    files = sorted((work / "photos").glob("*.jpg"))
    per_epoch = len(files) // BATCH
    made = {"dataloader": _dataloader, "threads": _threads}.get(variant)
    batches = made(files, per_epoch, epochs) if made else _ray(variant, work, per_epoch, epochs)
    started = next(batches)  # once there is a Ray
    for index, shape in enumerate(batches):
        assert shape == (BATCH, 3, SIDE, SIDE)
        if index == 0:
            first = time.monotonic() - started
        if index == SHORT * per_epoch - 1:
            mark = time.monotonic()
        if index == epochs * per_epoch - 1:
            cpu, wall = tree_cpu_by_part(), time.monotonic() - mark
    return {"images": epochs * per_epoch * BATCH, "cpu_s": cpu, "wall_s": wall, "first_s": first}


def _ray(variant: str, work: Path, per_epoch: int, epochs: int) -> Iterator[Any]:
    import ray

    from pipelines.config.data import DataConfig
    from pipelines.config.train import ModelConfig, PretrainConfig
    from pipelines.loading.loader import train_batches

    ray.init("local", num_cpus=WORKERS, include_dashboard=False)
    yield time.monotonic()
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
    for batch in make(cfg, rank=0, world_size=1, start_step=0, end_step=epochs * per_epoch):
        yield tuple(batch["images"].shape)
    ray.shutdown()


def torch_batches(cfg, *, rank: int, world_size: int, start_step: int, end_step: int) -> Iterator:
    """The batches of `train_batches`, by `iter_torch_batches` instead of our thread."""
    from ray.data.collate_fn import ArrowBatchCollateFn

    from pipelines.loading import loader, plan, tables

    class Collate(ArrowBatchCollateFn):
        def __call__(self, batch):
            return loader.to_batch(cfg, reader, batch, batch.column("step")[0].as_py(), pool)

    reader = loader.make_reader(cfg, rank, world_size)
    todo = list(plan.iter_pieces(reader.plan, start_step, end_step, reader.most_batches))
    share = loader.cluster_share(cfg, world_size)
    with ThreadPoolExecutor(cfg.data.decode_threads) as pool:
        batches = (
            tables.make_dataset(cfg, reader.part(todo), todo, share)
            .iterator()
            .iter_torch_batches(
                batch_size=reader.local_batch,
                prefetch_batches=cfg.data.prefetch_batches,
                collate_fn=Collate(),
                device="cpu",
            )
        )
        with contextlib.closing(iter(batches)) as batches:
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

    def write_crop(self, index: int, draws_4: np.ndarray, out_CHW: np.ndarray) -> None:
        """The same without wrappers: four numbers of [0, 1) make the box."""
        import torch

        encoded = torch.from_numpy(np.fromfile(self.files[index], np.uint8))
        pixels = torch.ops.image.decode_jpeg(encoded, 0, False)
        height, width = pixels.shape[1:]
        area = height * width * (SCALE[0] + draws_4[0] * (SCALE[1] - SCALE[0]))
        ratio = np.exp(np.interp(draws_4[1], (0, 1), np.log(RATIO)))
        w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
        top, left = int(draws_4[2] * (height - h + 1)), int(draws_4[3] * (width - w + 1))
        box = pixels[None, :, top : top + h, left : left + w]
        resize = torch.nn.functional.interpolate
        crop = resize(box, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        np.copyto(out_CHW, crop[0].numpy())


def _order(files: list[Path], per_epoch: int, epochs: int) -> list[int]:
    rng = np.random.default_rng(0)
    order = [rng.permutation(len(files))[: per_epoch * BATCH] for _ in range(epochs)]
    return np.concatenate(order).tolist()


def _dataloader(files: list[Path], per_epoch: int, epochs: int) -> Iterator[Any]:
    import torch

    yield time.monotonic()
    order = _order(files, per_epoch, epochs)
    loader = torch.utils.data.DataLoader(
        Photos(files), batch_size=BATCH, sampler=order, num_workers=WORKERS
    )
    for images in loader:
        yield tuple(images.shape)


def _threads(files: list[Path], per_epoch: int, epochs: int) -> Iterator[Any]:
    import torch

    rng, photos = np.random.default_rng(0), Photos(files)

    def batch(wanted: list[int], draws_B4: np.ndarray) -> Any:
        images_BCHW = torch.empty((BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
        for image_CHW, index, draws_4 in zip(images_BCHW, wanted, draws_B4, strict=True):
            photos.write_crop(index, draws_4, image_CHW.numpy())
        return images_BCHW

    yield time.monotonic()
    order = _order(files, per_epoch, epochs)
    batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    with ThreadPoolExecutor(WORKERS) as pool:
        made: deque[Any] = deque()
        for wanted in batches:
            made.append(pool.submit(batch, wanted, rng.random((BATCH, 4))))
            if len(made) > 2 * WORKERS:
                yield tuple(made.popleft().result().shape)
        for images in made:
            yield tuple(images.result().shape)


# --- all of them


def prepare(work: Path, images: int) -> None:
    """Photos and their shards; what is there already is kept."""
    photos = work / "photos"
    if not photos.is_dir() or len(list(photos.glob("*.jpg"))) != images:
        make_photos(photos, images)
    if (work / "shards" / "manifest.json").exists():
        return
    command = ["-m", "pipelines.ingest", "--source", str(photos), "--out", str(work / "shards")]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def run_variant(variant: str, work: Path) -> dict[str, float]:
    """Images by CPU second and by second, CPU milliseconds an image by part, first batches."""
    short, long = (_run(variant, work, epochs) for epochs in (SHORT, LONG))
    images = long["images"] - short["images"]
    spent = {part: long["cpu_s"][part] - short["cpu_s"][part] for part in long["cpu_s"]}
    return {
        "images_per_cpu_s": images / sum(spent.values()),
        "images_per_s": images / long["wall_s"],
        "first_batch_s": (short["first_s"] + long["first_s"]) / 2,
        **{f"{part}_ms": 1000 * seconds / images for part, seconds in spent.items()},
    }


def _run(variant: str, work: Path, epochs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", str(work), "--run", variant, str(epochs)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(work: Path, images: int, rounds: int, variants: list[str]) -> None:
    prepare(work, images)
    sizes = [path.stat().st_size for path in (work / "photos").glob("*.jpg")]
    print(f"{images} JPEGs, mean {np.mean(sizes) / 1024:.0f} KiB; load {os.getloadavg()[0]:.1f}")
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for turn in range(rounds):
        for variant in variants:
            results[variant].append(run_variant(variant, work))
            figures = {key: round(value, 3) for key, value in results[variant][-1].items()}
            print(f"round {turn + 1} {variant}: {json.dumps(figures)}", flush=True)
    _print_ratios(results)
    _print_medians(results)
    print(f"\nload average at the end: {os.getloadavg()[0]:.1f}")


def _print_ratios(results: dict[str, list[dict[str, float]]]) -> None:
    """Of the same round: median (lowest to highest)."""
    parts = []
    for base in ("dataloader", "threads"):
        for variant in results.keys() - {base} if base in results else ():
            pairs = zip(results[variant], results[base], strict=True)
            found = [mine["images_per_cpu_s"] / other["images_per_cpu_s"] for mine, other in pairs]
            low, high = min(found), max(found)
            parts.append(f"{variant} {np.median(found):.2f} ({low:.2f} to {high:.2f}) of {base}")
    print(f"result: images a CPU second: {'; '.join(sorted(parts))}")


def _print_medians(results: dict[str, list[dict[str, float]]]) -> None:
    names = list(next(iter(results.values()))[0])
    print("\n| variant | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for variant, found in results.items():
        figures = (f"{np.median([result[name] for result in found]):.4g}" for name in names)
        print(f"| {variant} | " + " | ".join(figures) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=BY_NAME, default=VARIANTS)
    parser.add_argument("--work", type=Path, help="kept; default: a temporary folder, removed")
    parser.add_argument(
        "--run", nargs=2, metavar=("VARIANT", "EPOCHS"), help="one run, on a prepared --work"
    )
    options = parser.parse_args()
    if options.images < BATCH:
        parser.error(f"--images: at least one batch of {BATCH}")
    if options.run:
        print(json.dumps(measure(options.run[0], options.work, int(options.run[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as temporary:
        work = options.work or Path(temporary)
        compare(work, options.images, options.rounds, options.variants)


if __name__ == "__main__":
    main()
