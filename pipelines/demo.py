"""Runs the whole pipeline once on real images, from a folder of files to a served embedding.

    python -m pipelines.demo

The demo unpacks the shipped CIFAR-10 sample, ingests it, pretrains VICReg (or another `--recipe`),
evaluates the encoder beside random-init and raw pixels, exports it, embeds the training set and
serves the encoder. Then it asks for embeddings of test images over HTTP and prints their nearest
neighbours.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    # `python pipelines/demo.py` from an uninstalled checkout: import from the root, not from here.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from ray import serve as ray_serve
from rich.console import Console
from rich.table import Table

from models.artifacts.artifact import load_artifact, weights_hash
from pipelines.config.ingest import IngestConfig
from pipelines.config.jobs import DemoConfig, EmbedConfig, EvaluateConfig, ExportConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import read_rows
from pipelines.embed import embed
from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.fetchers.shipped import sample_folder
from pipelines.ingest import ingest
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import CheckpointError
from pipelines.runtime.cluster import start_ray
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.training.launch import pretrain
from serve.app import build_app
from serve.embeddings.settings import ServeSettings

QUERIES = 5
NEIGHBOURS = 6


def demo(cfg: DemoConfig) -> dict[str, Any]:
    """Runs every stage; returns the results of `evaluate`."""
    cfg = prepare(cfg)
    out, console, started = Path(cfg.out), Console(), time.monotonic()
    with step(console, "1/6 ingest: image folders to validated shards"):
        folders = sample_folder(out / "images")
        train, test = str(out / "shards" / "train"), str(out / "shards" / "test")
        start_ray()
        for split, shards in (("train", train), ("test", test)):
            ingest(IngestConfig(source=str(folders / split), out=shards))
    with step(console, f"2/6 pretrain: {cfg.recipe} on Ray Train, watched for collapse"):
        result = pretrain(run_config(cfg, out, train, test))
    with step(console, "3/6 evaluate: beside random-init and raw pixels"):
        evaluation = EvaluateConfig(
            checkpoint=result.last_checkpoint,
            data=train,
            test=test,
            out=str(out / "evaluation"),
            seed=cfg.seed,  # random-init is then the very encoder this run started from
        )
        results = evaluate(evaluation, console=console)
    with step(console, "4/6 export: an artifact that timm and transformers load"):
        artifact = export(ExportConfig(checkpoint=result.last_checkpoint, out=str(out / "encoder")))
    with step(console, "5/6 embed: the training set to Parquet"):
        vectors = embedding_folder(out, artifact)
        embed(EmbedConfig(artifact=artifact, data=train, out=str(vectors)))
    with step(console, "6/6 serve: test images over HTTP"), endpoint(artifact) as url:
        queries = read_rows(test, columns=["image", "label"]).take(query_rows(test))
        answers = ask(url, Path(artifact).name, [row["image"] for row in queries.to_pylist()])
        console.print(neighbour_table(answers, queries, vectors, results["classes"]))
    console.print(verdict(results))
    console.print(f"report: {out / 'evaluation' / 'report.html'}", soft_wrap=True)
    command = f"serve run serve.app:build_app artifact={artifact}"
    console.print(f"serve it yourself: {command}", soft_wrap=True)  # whole, to be copied
    console.print(f"the demo took {time.monotonic() - started:.0f} s")
    return results


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Prints a stage's title before it and its duration after it."""
    console.rule(title, align="left")
    started = time.monotonic()
    yield
    console.print(f"({time.monotonic() - started:.0f} s)")


def run_config(cfg: DemoConfig, out: Path, train: str, test: str) -> PretrainConfig:
    """Returns the recipe's configuration with the demo's data, seed and length."""
    recipe = RECIPES[cfg.recipe][1]
    changes: dict[str, Any] = {"storage": str(out / "runs"), "seed": cfg.seed}
    changes["name"] = f"{cfg.recipe}-seed{cfg.seed}"
    if cfg.steps is not None:
        changes["steps"] = cfg.steps
    changes["precision"] = cfg.precision or ("bf16" if cpu_has_bf16() else recipe.run.precision)
    warmup = min(recipe.optim.warmup_steps, changes.get("steps", recipe.run.steps))
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, train=train, test=test),
        optim=dataclasses.replace(recipe.optim, warmup_steps=warmup),
        run=dataclasses.replace(recipe.run, **changes),
    )


def embedding_folder(out: Path, artifact: str) -> Path:
    """Returns the folder for this encoder's embeddings.

    Each encoder has its own, because `embed` refuses to mix encoders and one `out` may hold many.
    """
    return out / "embeddings" / weights_hash(load_artifact(artifact).encoder)[:12]


def cpu_has_bf16() -> bool:
    """Tells whether the CPU computes in bf16 natively; on others bf16 is slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def query_rows(test: str) -> list[int]:
    """Returns the row of the first test image of each of `QUERIES` classes."""
    labels = read_rows(test, columns=["label"]).column("label").to_numpy()
    _, first = np.unique(labels, return_index=True)
    return [int(row) for row in first[:QUERIES]]


@contextmanager
def endpoint(artifact: str) -> Iterator[str]:
    """Serves the artifact on a free local port and yields the base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServeSettings(artifact=artifact, cpus=0.5, ingress_cpus=0.25)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        ray_serve.run(build_app(settings), name="demo", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]


def ask(url: str, model: str, images: list[bytes]) -> npt.NDArray[np.float32]:
    """Embeds encoded images through `POST /v1/embeddings`; returns fp32 [images, width]."""
    inputs = ["data:image/png;base64," + b64encode(image).decode() for image in images]
    body = {"model": model, "input": inputs, "encoding_format": "float"}
    response = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60)
    response.raise_for_status()
    rows = sorted(response.json()["data"], key=lambda row: row["index"])
    return np.asarray([row["embedding"] for row in rows], dtype=np.float32)


def neighbour_table(
    answers_QD: npt.NDArray[np.float32], queries: pa.Table, vectors: Path, classes: list[str]
) -> Table:
    """Tabulates the classes of the stored embeddings most similar (cosine) to the served ones."""
    files = sorted(vectors.glob("*.parquet"))
    bank = pa.concat_tables([pq.read_table(file, columns=["embedding", "label"]) for file in files])
    bank_ND = np.stack(bank.column("embedding").to_numpy())
    bank_ND = bank_ND / np.linalg.norm(bank_ND, axis=1, keepdims=True)
    nearest_QK = np.argsort(-(answers_QD @ bank_ND.T), axis=1)[:, :NEIGHBOURS]
    labels_N = bank.column("label").to_numpy()
    table = Table("test image", "nearest training images, nearest first", title="neighbours")
    for label, row in zip(queries.column("label").to_pylist(), nearest_QK, strict=True):
        names = [classes[labels_N[n]] for n in row]
        marked = [f"[green]{n}[/]" if n == classes[label] else n for n in names]
        table.add_row(classes[label], ", ".join(marked))
    return table


def verdict(results: dict[str, Any]) -> str:
    """Says in one line how the trained encoder compares with random-init and raw pixels."""
    rows = results["rows"]
    trained, random, pixels = (
        100 * rows[name]["knn"] for name in ("encoder", "random_init", "raw_pixels")
    )
    return (
        f"kNN {trained:.1f}% ({trained - random:+.1f} points over its random init's {random:.1f}%; "
        f"raw pixels {pixels:.1f}%)"
    )


def main() -> None:
    """Entry point of `python -m pipelines.demo`."""
    run_command(lambda: tyro.cli(DemoConfig, description=__doc__), _demo_or_advise)


def _demo_or_advise(cfg: DemoConfig) -> None:
    try:
        demo(cfg)
    except (CheckpointError, ValueError) as error:
        advice = f"To start afresh, give another --out than {cfg.out}, or remove it."
        raise type(error)(f"{error}\n{advice}") from error


if __name__ == "__main__":
    main()
