"""Ingest of all 60,000 CIFAR-10 images and 50 broken files: speed, and what a kill costs.

    python benchmarks/data/ingest.py --cifar10 data/cifar10 --work /tmp/ingest-bench

`data/cifar10` is what `python -m pipelines.fetch cifar10 --out data/cifar10` writes. Three runs of
`python -m pipelines.ingest`, each in processes of its own: uninterrupted; killed (SIGKILL to it and
to its Ray) when half of the chunks are staged; and that one again. Results:
benchmarks/data/ingest.md.
"""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def noise(seed: int, height: int = 48, width: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, target: str, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, target, quality=quality)
    return buffer.getvalue()


def _truncated(target: str) -> Callable[[Path, int], None]:
    def write(path: Path, seed: int) -> None:
        data = encoded(noise(seed), target)
        path.write_bytes(data[: len(data) // 2])

    return write


def _corrupt_png(path: Path, seed: int) -> None:
    data = bytearray(encoded(noise(seed), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(16)
    path.write_bytes(data)


def png(width: int, height: int, bits: int, body: bytes) -> bytes:
    """Returns an RGB PNG around compressed rows that may or may not be what the header says."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _bomb(path: Path, seed: int) -> None:
    """A few bytes that claim 40,000 x 40,000 pixels."""
    path.write_bytes(png(40_000, 40_000 + seed, 8, zlib.compress(bytes(1000))))


def _large(path: Path, seed: int) -> None:
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1 + seed)  # sparse


# Kind, file suffix, the reason ingest must give, and how to make one.
BROKEN: tuple[tuple[str, str, str, Callable[[Path, int], None]], ...] = (
    ("empty", "jpg", "empty", lambda path, _: path.write_bytes(b"") and None),
    ("text", "jpg", "not_an_image", lambda path, i: path.write_text(f"Not found: {i}") and None),
    ("cut_jpeg", "jpg", "truncated", _truncated("JPEG")),
    ("cut_png", "png", "truncated", _truncated("PNG")),
    ("corrupt_png", "png", "decode_error", _corrupt_png),
    ("bomb", "png", "too_many_pixels", _bomb),
    ("large", "jpg", "too_many_bytes", _large),
    ("lost_link", "jpg", "unreadable", lambda path, i: path.symlink_to(f"/nonexistent/{i}")),
)


def write_broken(folder: Path, count: int) -> dict[str, int]:
    """Writes `count` broken files of the eight kinds in turn; returns the number by reason."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons: dict[str, int] = {}
    for index in range(count):
        kind, suffix, reason, make = BROKEN[index % len(BROKEN)]
        path = folder / f"{kind}_{index}.{suffix}"
        if not path.exists() and not path.is_symlink():
            make(path, index)
        reasons[reason] = reasons.get(reason, 0) + 1
    return dict(sorted(reasons.items()))


def start_ingest(
    source: Path | str,
    out: Path | str,
    log: Path,
    form: tuple[str, ...] = ("-m", "pipelines.ingest"),
) -> subprocess.Popen[bytes]:
    """Starts the ingest command as leader of a session of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, *form, "--source", str(source), "--out", str(out)]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def kill_when_staged(process: subprocess.Popen[bytes], out: Path, chunks: int) -> int:
    """SIGKILLs ingest and its Ray as soon as `chunks` chunks are staged; returns how many were."""
    staging = out / "_staging"
    while (staged := len(list(staging.glob("*.items.parquet")))) < chunks:
        if process.poll() is not None:
            raise RuntimeError(f"ingest ended by itself ({process.returncode})")
        time.sleep(0.01)
    _kill_session(process.pid)
    process.wait()
    return staged


def _session(session: int) -> dict[int, float]:
    """Returns CPU seconds by process of a session: Ray puts its own into groups, not sessions."""
    mine = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # gone in the meantime
            continue
        if int(fields[3]) == session:
            ticks = int(fields[11]) + int(fields[12])  # user, system
            mine[int(stat.parent.name)] = ticks / os.sysconf("SC_CLK_TCK")
    return mine


def _kill_session(session: int) -> None:
    for pid in _session(session):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _wait(process: subprocess.Popen[bytes]) -> float:
    """Waits for the end and returns the CPU seconds of the session, to about 0.2 s a process."""
    seconds: dict[int, float] = {}
    while process.poll() is None:
        seconds.update(_session(process.pid))
        time.sleep(0.2)
    return sum(seconds.values())


def main(cifar10: Path, work: Path) -> None:
    """Builds the source and runs the three ingests.

    Args:
        cifar10: Folder with CIFAR-10's `train` and `test`.
        work: Folder for the source tree, the shards and the logs.
    """
    from pipelines.dataset.shards import MANIFEST, read_rows, verify_shards

    source = work / "source"
    source.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        if not (source / split).exists():
            subprocess.run(["cp", "-rl", str(cifar10 / split), str(source / split)], check=True)
    reasons = write_broken(source / "broken", 50)

    def run(name: str, out: Path) -> None:
        print(f"{name}: load average at the start {os.getloadavg()[0]:.1f}", flush=True)
        started, log = time.monotonic(), work / f"{name}.log"
        process = start_ingest(source, out, log)
        cpu = _wait(process)
        if process.returncode:
            raise RuntimeError(f"{name} failed:\n{log.read_text()}")
        seconds = time.monotonic() - started
        print(log.read_text().partition("reading done")[2])
        print(
            f"{name}: {seconds:.1f} s, {cpu:.1f} CPU-s, from start to end of the process, Ray's too"
        )

    whole, broken_off = work / "uninterrupted", work / "killed"
    run("uninterrupted", whole)
    manifest = verify_shards(whole)
    chunks = 128
    staged = kill_when_staged(start_ingest(source, broken_off, work / "kill.log"), broken_off, 64)
    print(f"killed with {staged} of {chunks} chunks staged")
    assert not (broken_off / MANIFEST).exists()
    run("again", broken_off)

    verify_shards(broken_off)
    same = (whole / MANIFEST).read_bytes() == (broken_off / MANIFEST).read_bytes()
    ids = read_rows(broken_off, columns=["sample_id"])["sample_id"]
    print(f"manifest identical after the kill: {same}")
    print(f"rows {len(ids):,}, distinct {len(ids.unique()):,}, duplicates {manifest.duplicates}")
    print(f"quarantined {manifest.quarantined}")
    assert same
    assert len(ids.unique()) == len(ids) == 60_000 - manifest.duplicates
    assert manifest.quarantined == reasons


if __name__ == "__main__":
    import tyro

    sys.path[0] = str(ROOT)
    tyro.cli(main)
