"""Throughput and latency of `/v1/embeddings` on loopback, beside peers and the bare loop.

    python benchmarks/serving/serving.py --infinity VENV/bin/python   # three rounds, 15 minutes
    python benchmarks/serving/serving.py --rounds 1 --load.requests 50 200     # a quick look

The bare loop decodes the same JPEGs with the same number of decoder threads and runs the same
encoder on full batches with the same number of torch threads, in one process, without HTTP. It
runs before and after the servers of every round, because machines drift, and a ratio is always to
the two bare loops of its own round. "Concurrent batches" is the same with as many batches side by
side as the endpoint runs. Weights are random: speed does not depend on them. Everything stays on
this machine; every phase ends by count or by time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

import tyro

from benchmarks.serving.load import Load, in_process, make_jpegs, make_requests, measure
from benchmarks.serving.model import Model, forward_threads, settings_for
from benchmarks.serving.servers import (
    HAPROXY,
    THROUGHPUT,
    Server,
    endpoint,
    infinity,
    plain_fastapi,
)

BARE, CONCURRENT = "bare loop", "bare loop, concurrent batches"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    model: Model = field(default_factory=Model)
    load: Load = field(default_factory=Load)
    rounds: int = 3
    """Every round measures everything once."""
    bare_images: int = 384
    """Images of each bare loop; 0 leaves the bare loops out, and with them the ratios."""
    infinity: str = ""
    """Python of an environment with infinity (see peer_infinity.py); empty leaves that row out."""
    rows: tuple[str, ...] = (
        "endpoint",
        "endpoint, throughput mode",
        "endpoint, HAProxy",
        "together",
        "together, HAProxy",
        "@serve.batch",
        "FastAPI",
        "infinity",
    )
    """Servers to measure, in this order. The endpoint's model has replicas of its own, and with
    `together` it runs in the HTTP replicas. The throughput mode is Serve's
    (`RAY_SERVE_THROUGHPUT_OPTIMIZED`), and HAProxy `RAY_SERVE_ENABLE_HA_PROXY`, of the endpoint in
    the throughput mode."""
    out: str = ""
    """Add the rounds to this JSON-lines file; the table is of all rounds in it."""


def write_artifact(model: Model, folder: str) -> None:
    """Writes an encoder with random weights."""
    from models.artifacts.artifact import save_artifact
    from models.encoders.vit import build_encoder
    from models.media.preprocessing import Preprocessing

    encoder = build_encoder(model.preset, image_size=model.image_size, patch_size=model.patch_size)
    prep = Preprocessing(image_size=model.image_size, mean=(0.5,) * 3, std=(0.25,) * 3)
    state = {"run": "benchmark", "step": 0, "manifest_hash": ""}
    save_artifact(pathlib.Path(folder), encoder, prep, state)


def bare_loop(
    model: Model, folder: str, jpegs: list[bytes], images: int, concurrent: int
) -> dict[str, float]:
    """Decode and forward, batch after batch, nothing else.

    Args:
        model: the model.
        folder: its artifact.
        jpegs: decoded in turn.
        images: how many at least.
        concurrent: batches side by side, which share the batch size and the threads.
    """
    from serve.embeddings.media.inputs import to_input
    from serve.embeddings.replica.embedder import Encoder

    forward = forward_threads(concurrent, model.threads // concurrent)
    encoder = Encoder(settings_for(model, folder))
    pool, size = ThreadPoolExecutor(model.decode_threads), model.batch_size // concurrent

    def decode(index: int) -> Any:
        data = jpegs[index % len(jpegs)]
        return to_input(data, encoder.preprocessing, max_pixels=10**8, param="input")

    def run(start: int) -> tuple[float, float]:
        began = time.perf_counter()
        numbers = range(start, start + model.batch_size)
        items = [(image.input, "mean") for image in pool.map(decode, numbers)]
        decoded = time.perf_counter()
        parts = [items[first : first + size] for first in range(0, len(items), size)]
        list(forward.map(encoder.run, parts))
        return decoded - began, time.perf_counter() - decoded

    run(0)
    before, began = time.process_time(), time.perf_counter()
    phases = [run(start) for start in range(0, images, model.batch_size)]
    wall, done = time.perf_counter() - began, len(phases) * model.batch_size
    return {
        "images_per_s": done / wall,
        "cpu_ms_per_image": (time.process_time() - before) / done * 1e3,
        "decode_share": sum(decode_s for decode_s, _ in phases) / wall,
    }


def servers(config: Config) -> dict[str, Server]:
    """Returns the servers to measure, by the name of their rows."""
    known: dict[str, Server] = {
        "endpoint": endpoint({}),
        "endpoint, throughput mode": endpoint(THROUGHPUT),
        "endpoint, HAProxy": endpoint(HAPROXY | THROUGHPUT),
        "together": endpoint({}, placement="together"),
        "together, HAProxy": endpoint(HAPROXY, placement="together"),
        "@serve.batch": endpoint({}, batching="serve.batch"),
        "FastAPI": plain_fastapi,
    }
    if config.infinity:
        known["infinity"] = infinity(config.infinity)
    return {name: known[name] for name in config.rows if name in known}


def one_round(config: Config, folder: str, jpegs: list[bytes]) -> dict[str, Any]:
    """Measures everything once; returns what `table` takes."""

    def bare(concurrent: int) -> dict[str, float]:
        if not config.bare_images:
            return {"images_per_s": math.nan, "cpu_ms_per_image": math.nan}
        found = in_process(bare_loop, config.model, folder, jpegs, config.bare_images, concurrent)
        print(json.dumps({"concurrent_batches": concurrent} | found), flush=True)
        return dict(found)

    before, concurrent = bare(1), bare(config.model.threads)
    levels = {}
    for name, server in servers(config).items():
        with server(config.model, folder) as target:
            requests = make_requests(target, jpegs)
            levels[name] = [
                measure(target, config.load, requests, level)
                for level in range(len(config.load.concurrency))
            ]
        print(json.dumps({name: levels[name]}), flush=True)
    return {"bare": [before, bare(1)], "concurrent": concurrent, "levels": levels}


def spread(values: list[float], digits: int) -> str:
    """Returns the median, and behind it the least and the greatest value if they differ."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def table(rounds: list[dict[str, Any]]) -> str:
    """The results as Markdown: medians over the rounds, and their spread."""

    def over(value: Callable[[dict[str, Any]], float], digits: int) -> str:
        return spread([value(each) for each in rounds], digits)

    rate = over(lambda each: each["concurrent"]["images_per_s"], 1)
    ratio = over(lambda each: each["concurrent"]["images_per_s"] / _bare(each), 2)
    rows = [
        "| | of bare loop | images/s | p50 ms | p99 ms | errors / requests |",
        "|---|---|---|---|---|---|",
        f"| {BARE} | 1 | {over(_bare, 1)} | | | |",
        f"| {CONCURRENT} | {ratio} | {rate} | | | |",
    ]
    costs = [f"- {BARE} {over(lambda each: each['bare'][0]['cpu_ms_per_image'], 1)}"]
    for name, levels in rounds[0]["levels"].items():
        for at in range(len(levels)):
            found = [each["levels"][name][at] for each in rounds]
            rows.append(_row(name, found, [_bare(each) for each in rounds]))
            costs.append(_cost(name, found))
    return "\n".join([*rows, "", "CPU ms a request, by process:", "", *costs, "", result(rounds)])


def result(rounds: list[dict[str, Any]]) -> str:
    """Returns one line: the ratio of every server and number of clients to the bare loop."""
    found = []
    for name, levels in rounds[0]["levels"].items():
        for at, level in enumerate(levels):
            rates = [each["levels"][name][at]["images_per_s"] for each in rounds]
            ratios = [rate / _bare(each) for rate, each in zip(rates, rounds, strict=True)]
            found.append(f"{name} {spread(ratios, 2)} at {level['concurrency']}")
    return f"result: of the bare loop, by clients: {'; '.join(found)}"


def _bare(each: dict[str, Any]) -> float:
    """Images a second of a round's two bare loops, on average."""
    return statistics.mean(loop["images_per_s"] for loop in each["bare"])


def _row(name: str, found: list[dict[str, Any]], bare: list[float]) -> str:
    clients = found[0]["concurrency"]
    rates = [level["images_per_s"] for level in found]
    ratios = [rate / loop for rate, loop in zip(rates, bare, strict=True)]
    p50, p99 = (spread([level[key] for level in found], 0) for key in ("p50_ms", "p99_ms"))
    errors, requests = (sum(level[key] for level in found) for key in ("errors", "requests"))
    return (
        f"| {name}, {clients} client{'s' * (clients > 1)} | {spread(ratios, 2)} "
        f"| {spread(rates, 1)} | {p50} | {p99} | {errors} / {requests} |"
    )


def _cost(name: str, found: list[dict[str, Any]]) -> str:
    costs = [level["cpu_ms_per_request"] for level in found]
    parts = (f"{role} {spread([cost.get(role, 0.0) for cost in costs], 1)}" for role in costs[0])
    return f"- {name}, {found[0]['concurrency']}: {', '.join(parts)}"


def main() -> None:
    """Runs the benchmark and prints the table."""
    config = tyro.cli(Config)
    jpegs = make_jpegs(config.load)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/{config.model.preset}"
        in_process(write_artifact, config.model, folder)
        for _ in range(config.rounds):
            rounds.append(one_round(config, folder, jpegs))
            if config.out:
                with pathlib.Path(config.out).open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(config) | rounds[-1]) + "\n")
    if config.out:
        rounds = [json.loads(line) for line in pathlib.Path(config.out).read_text().splitlines()]
    print(table(rounds))


if __name__ == "__main__":
    main()
