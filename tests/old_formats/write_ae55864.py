"""Writes the files in `ae55864/` with the code of commit ae55864, and what that code reads in them.

    git worktree add --detach /tmp/ae55864 ae55864
    (cd /tmp/ae55864 && PYTHONPATH=/tmp/ae55864 python THIS_FILE /tmp/rayjepa-ae55864)

The imports below are those of that commit; today's packages have other names. The jobs run as their
commands do (`main` with arguments), on one local Ray. `expected.json` holds what the old code read
back. Encoders are narrower than any preset, so that a checkpoint is some 100 KB: the two presets
below are added in the driver and in Ray's workers, and the tests add them to today's table.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PREDICTOR = {"predictor_width": 12, "predictor_depth": 1, "predictor_heads": 1}
PRESETS = {
    "fixture_deep": {"width": 12, "depth": 2, "heads": 3} | _PREDICTOR,
    "fixture_flat": {"width": 12, "depth": 1, "heads": 1} | _PREDICTOR,
}
TRAIN_IMAGES, TEST_IMAGES, CLASSES = 24, 12, ("airplane", "automobile", "ship")
STEPS, CHECKPOINT_EVERY = 6, 3
SMALL = ("--model.image-size", 16, "--model.patch-size", 4)


def add_presets() -> None:
    from models.vit import PRESETS as TABLE
    from models.vit import Preset

    TABLE.update({name: Preset(**shape) for name, shape in PRESETS.items()})


def command(main: Callable[[], None], *arguments: object) -> None:
    sys.argv = ["command", *map(str, arguments)]
    main()


def write_sources(raw: Path) -> None:
    """Some of the shipped sample, one damaged file and one that is there twice."""
    import pipelines

    shipped = Path(pipelines.__file__).parent
    with tarfile.open(shipped / "sample/cifar10.tar.gz") as tar:
        names = sorted(tar.getnames())
        for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
            for kind in CLASSES:
                found = [n for n in names if f"{split}/{kind}/" in n and n.endswith(".png")]
                for name in found[: count // len(CLASSES)]:
                    path = raw / split / kind / Path(name).name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(tar.extractfile(name).read())  # type: ignore[union-attr]
    first = min((raw / "train" / CLASSES[0]).iterdir())
    (first.parent / "damaged.png").write_bytes(first.read_bytes()[:300])
    shutil.copy(first, first.parent / "same-again.png")
    for direction in ("e", "n", "w", "s"):
        for path in sorted((shipped / "sample_video/movingmnist" / direction).glob("*.mp4"))[:3]:
            (raw / "video" / direction).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, raw / "video" / direction)
    damaged = raw / "video" / "e" / "damaged.mp4"
    damaged.write_bytes(min((raw / "video" / "e").iterdir()).read_bytes()[:900])
    write_transport(shipped / "sample_video/bigbuckbunny/bigbuckbunny.mp4", raw / "live.ts")


def write_transport(film: Path, path: Path, seconds: float = 2.5) -> None:
    """The beginning of a film as a stream has it: encoded anew, in MPEG-TS."""
    import av

    with av.open(str(film)) as source, av.open(str(path), "w", format="mpegts") as target:
        stream = target.add_stream("h264", rate=10, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, frame in enumerate(source.decode(video=0)):
            if number >= 10 * seconds:
                break
            small = frame.reformat(64, 48, "yuv420p")
            small.pts, small.time_base = number, stream.codec_context.time_base or small.time_base
            target.mux(stream.encode(small))
        target.mux(stream.encode())


def write_shards(raw: Path, shards: Path) -> None:
    from pipelines.ingest import main

    packing = ("--row-group-rows", 4, "--shard-bytes", 32_768)
    for split in ("train", "test"):
        command(main, "--source", raw / split, "--out", shards / split, *packing)
    cut = ("--video.fps", 10, "--video.segment-seconds", 1, "--video.key-frame-every", 5)
    command(main, "--source", raw / "video", "--out", shards / "video", *cut, *packing)
    live = ("--follow", "--short-side", 32, "--live.end-seconds", 1, "--live.read-seconds", 1)
    command(main, "--source", raw / "live.ts", "--out", shards / "live", *cut, *live)


def write_runs(shards: Path, runs: Path) -> None:
    from pipelines.pretrain import main

    images = ("--data.train", shards / "train", "--data.batch-size", 8, "--data.lanes", 2)
    images += ("--data.shuffle-window", 8)
    kept = ("--run.steps", STEPS, "--run.checkpoint-every", CHECKPOINT_EVERY, "--run.log-every", 1)
    kept += ("--run.threads", 1, "--run.storage", runs, "--optim.warmup-steps", 2)
    kept += ("--run.probe-every", 0, "--run.log-samples", *SMALL)
    deep, flat = ("--model.encoder", "fixture_deep"), ("--model.encoder", "fixture_flat")
    command(main, "debug", "--run.name", "ijepa", *images, *kept, *deep)
    joint = ("--objective.name", "vicreg", "--objective.projector", 16, 16, "--data.test", "")
    command(main, "vicreg_cifar10_demo", "--run.name", "vicreg", *images, *kept, *joint, *flat)
    hyper = ("--optim.name", "hyper-adamw", "--optim.tune", "lr", "beta1", "--run.workers", 2)
    hyper += ("--optim.tune-until", 1)
    command(main, "debug", "--run.name", "hyper", *images, *kept, *hyper, *flat)
    clips = ("--data.train", shards / "video", "--data.batch-size", 4, "--data.lanes", 2)
    clips += ("--model.frames", 4, "--model.positions", "rope_released")
    clips += ("--data.shuffle-window", 4)
    command(main, "vjepa_movingmnist", "--run.name", "vjepa", *clips, *kept, *flat)


def write_products(out: Path) -> None:
    """What is made of runs: artifacts, embeddings, evaluations, a sweep."""
    from pipelines import embed, evaluate, export, sweep

    runs, shards = out / "runs", out / "shards"
    for kind, run, data in (("image", "ijepa", "test"), ("video", "vjepa", "video")):
        artifact = out / "artifacts" / kind
        command(export.main, "--checkpoint", runs / run, "--out", artifact)
        embeddings = out / "embeddings" / kind
        command(embed.main, "--artifact", artifact, "--data", shards / data, "--out", embeddings)
    sets = ("--data", shards / "train", "--test", shards / "test")
    for run in ("ijepa", "vicreg"):
        evaluation = out / "evaluations" / run
        probes = ("--knn-k", 5, "--probe-epochs", 3, "--out", evaluation)
        command(evaluate.main, "--checkpoint", runs / run, *sets, *probes)
    arguments = ("debug", "--data.train", shards / "train", "--data.test", shards / "test")
    arguments += (
        "--data.batch-size",
        8,
        "--data.lanes",
        2,
        "--model.encoder",
        "fixture_flat",
        *SMALL,
    )
    arguments += ("--run.steps", 4, "--run.log-every", 1, "--run.checkpoint-every", 2)
    arguments += ("--run.threads", 1, "--space", "optim.lr=1e-4,1e-3", "--out", out / "sweep")
    command(sweep.main, *arguments)


async def write_sessions(out: Path) -> dict[str, Any]:
    """Sessions of a replica, in a folder and in segments, and how each of them goes on."""
    import fsspec

    tests = Path(sys.path[0], "tests")
    sys.path.insert(0, str(tests))
    from lm_serving import cluster, load_ids, save_tiny_lm, say

    model = out / "lm" / "model"
    model.mkdir(parents=True)
    save_tiny_lm(model)
    remote = fsspec.filesystem("memory")
    stores = {"local": str(out / "lm" / "local"), "segments": "memory://lm"}
    readings: list[dict[str, Any]] = []
    for store in stores.values():
        async with cluster(model, store=store, sessions=2) as made:
            replica = made.replica
            await replica.create("pinned", 6, tuple(load_ids("Pinned.")), None, "request-1")
            await say(replica, "pinned", "One turn.", max_tokens=12)
            await say(replica, "long", "A stream longer than its cache", max_tokens=40)
            await say(replica, "other", "This one takes a slab.", max_tokens=4)  # evicts `pinned`
            await replica.fork("long", "twin", "request-2")  # a snapshot too
            await say(replica, "long", " and more", max_tokens=9)
            await say(replica, "pinned", " Again.", max_tokens=5)  # its log ahead of its snapshot
    remote.get("/lm", str(out / "lm" / "segments"), recursive=True)
    for name in stores:
        for kind in ("snapshots", "log alone"):
            copy = out / "copy"
            shutil.copytree(out / "lm" / name, copy)
            if kind == "log alone":
                for folder in copy.glob("*/snapshots"):
                    shutil.rmtree(folder)
            uri = str(copy)
            if name == "segments":
                uri = f"memory://again {kind}"
                remote.put(str(copy), f"/again {kind}", recursive=True)
            readings.append(await read_sessions(model, uri))
            shutil.rmtree(copy)
    assert all(reading == readings[0] for reading in readings)  # however they are read
    return readings[0]


async def read_sessions(model: Path, store: str) -> dict[str, Any]:
    """What a new replica finds: each session's stream, and the tokens it goes on with, greedily."""
    from lm_serving import cluster, say

    found = {}
    async with cluster(model, store=store, sessions=2) as made:
        for name in ("pinned", "long", "other", "twin"):
            state = await made.replica.describe_session(name)
            log = made.replica._sessions._shelf.store.open_log(name, 1000)
            stream = log.read(0)
            log.close()
            found[name] = {
                "position": state.stream_position,
                "sinks": state.sinks,
                "stream": stream,
                "next": await say(made.replica, name, "", max_tokens=10),
            }
    return found


def read_shards(shards: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    from pipelines.shards import QUARANTINE, read_manifest, read_rows, verify_shards

    found = {}
    for folder in sorted(shards.iterdir()):
        manifest = verify_shards(folder)
        rows = read_rows(folder).to_pylist()
        refused = []
        if (folder / QUARANTINE).exists():
            refused = pq.read_table(folder / QUARANTINE).to_pylist()
        found[folder.name] = {
            "manifest_hash": read_manifest(folder).manifest_hash,
            "modality": manifest.modality,
            "classes": list(manifest.classes),
            "num_frames": manifest.num_frames,
            "duplicates": manifest.duplicates,
            "sample_ids": [row["sample_id"].hex() for row in rows],
            "labels": [row["label"] for row in rows],
            "quarantine": refused,
        }
    return found


def read_runs(runs: Path) -> dict[str, Any]:
    """Features by each checkpoint's encoder of a fixed batch."""
    import torch

    from pipelines.checkpoints import committed_checkpoints, load_encoder
    from pipelines.features import encoder_features, preprocessing_of

    found = {}
    for run in sorted(runs.iterdir()):
        features = {}
        for uri, _ in committed_checkpoints(str(run)):
            encoder, config, info = load_encoder(uri)
            shape = (2, 3, *((encoder.frames,) if encoder.frames > 1 else ()), 16, 16)
            pixels = (torch.arange(torch.tensor(shape).prod()) * 7 % 256).to(torch.uint8)
            featurize = encoder_features(encoder.eval(), preprocessing_of(config.model))
            features[str(info["step"])] = featurize(pixels.reshape(shape)).tolist()
        found[run.name] = {"features": features}
    return found


def tidy(out: Path) -> None:
    """Removes what nothing reads again, or what only pictures and event files hold."""
    for folder in [*out.rglob("tensorboard"), out / "sweep" / "tune"]:
        shutil.rmtree(folder, ignore_errors=True)
    for path in [*out.rglob("report.html"), *out.rglob("*.png")]:
        path.unlink()
    for path in out.glob("sweep/runs/*/checkpoint_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    import ray

    out, only = Path(sys.argv[1]).resolve(), (sys.argv[2:] or [None])[0]
    code = str(Path.cwd())
    assert Path(code, "models", "vit.py").exists(), "run it in a checkout of ae55864"
    sys.path.insert(0, code)
    add_presets()
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": code}, "worker_process_setup_hook": add_presets},
    )
    out.mkdir(parents=True, exist_ok=True)
    raw, expected = out.with_name(f"{out.name}-raw"), {}
    for name, work in {
        "sources": lambda: write_sources(raw),
        "shards": lambda: write_shards(raw, out / "shards"),
        "runs": lambda: write_runs(out / "shards", out / "runs"),
        "products": lambda: write_products(out),
        "sessions": lambda: asyncio.run(write_sessions(out)),
        "read shards": lambda: read_shards(out / "shards"),
        "read runs": lambda: read_runs(out / "runs"),
    }.items():
        if only in (None, name):
            read = work()
            if read is not None:
                expected[name.removeprefix("read ")] = read
    tidy(out)
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
