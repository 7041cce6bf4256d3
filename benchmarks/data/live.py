"""A live stream is ingested and embedded while it runs, and its ingest is killed and restarted.

    python benchmarks/data/live.py --film bigbuckbunny.mp4                        # 10 minutes
    python benchmarks/data/live.py --film bigbuckbunny.mp4 --seconds 60           # a quick look
    python benchmarks/data/live.py --film bigbuckbunny.mp4 --seconds 60 --through file

Three processes beside this one: an encoder that loops real footage in real time as MPEG-TS, to
whoever is connected to its TCP port or into a file that grows; `pipelines.ingest --follow`; and
`pipelines.embed --follow` with a small clip encoder of random weights. At half time ingest is sent
SIGKILL and started again at once; at the end SIGTERM, after which embed ends by itself.

Every frame bears its number as a row of black and white squares, which survive both encodings. So
what is in the shards is checked frame by frame afterwards: nothing twice, nothing missing but what
was lost by the kill. Lag is from the moment a frame is given to the encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
BITS, SQUARE = 24, 40  # pixels a square, of the source
SEGMENT_S, PUBLISH_S, SHORT_SIDE, KEEP = 4.0, 10.0, 256, 2  # one source frame of so many is kept


# --- the stream


class Tap:
    """What the muxer writes to: the one client of a TCP port, nobody, or a file."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("ab", buffering=0) if path else None
        self._client: socket.socket | None = None
        self.listener = None if path else socket.create_server(("127.0.0.1", 0))
        if self.listener:
            threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            client.settimeout(5)
            self._client = client

    def write(self, data: bytes) -> int:
        if self._file:
            self._file.write(data)
        elif (client := self._client) is not None:
            try:
                client.sendall(data)
            except OSError:
                self._client = None
        return len(data)


def load_film(path: Path) -> tuple[list[np.ndarray], Fraction]:
    """All frames, yuv420p as PyAV's arrays [H * 3 / 2, W], and their rate."""
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        return [f.to_ndarray(format="yuv420p") for f in film.decode(stream)], stream.average_rate


def stamp(picture: np.ndarray, number: int) -> np.ndarray:
    """A copy with the number along its upper edge."""
    picture = picture.copy()
    height, width = picture.shape[0] * 2 // 3, picture.shape[1]
    planes = picture[height:].reshape(2, height // 2, width // 2)
    planes[:, : SQUARE // 2, : BITS * SQUARE // 2] = 128
    for bit in range(BITS):
        value = 235 if number >> bit & 1 else 16
        picture[:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = value
    return picture


def number_of(pixels: np.ndarray, source_width: int) -> int:
    """The number on an RGB picture of any size."""
    scale = pixels.shape[1] / source_width
    number = 0
    for bit in range(BITS):
        x, y = int((bit + 0.5) * SQUARE * scale), int(SQUARE / 2 * scale)
        number |= int(pixels[y - 2 : y + 3, x - 2 : x + 3].mean() > 125) << bit
    return number


def stream(film: Path, seconds: float, log: Path, path: Path | None) -> None:
    """Encodes in real time; `log` gets each frame's time and how late the encoder was."""
    pictures, rate = load_film(film)
    tap = Tap(path)
    if tap.listener:
        print(tap.listener.getsockname()[1], flush=True)
    container = av.open(tap, "w", format="mpegts", options={"flush_packets": "1"})
    video = container.add_stream("libx264", rate=rate)
    video.height, video.width = pictures[0].shape[0] * 2 // 3, pictures[0].shape[1]
    video.pix_fmt = "yuv420p"
    video.options = {"preset": "ultrafast", "tune": "zerolatency", "g": "25", "threads": "1"}
    video.codec_context.time_base = 1 / rate
    sys.stdin.readline()  # the others are ready
    began, times = time.time(), []
    for number in range(round(seconds * rate)):
        time.sleep(max(0.0, began + number / rate - time.time()))
        times.append(time.time())
        picture = stamp(pictures[number % len(pictures)], number)
        frame = av.VideoFrame.from_ndarray(picture, "yuv420p")
        frame.pts, frame.time_base = number, 1 / rate
        container.mux(video.encode(frame))
    np.save(log, np.array(times))


# --- watching


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Watcher:
    """Reads the set as a reader does: it must be whole, and the beginning of the next one."""

    def __init__(self, out: Path, embeddings: Path) -> None:
        self._out, self._embeddings = out, embeddings
        self.published_at: dict[str, float] = {}
        self.embedded_at: dict[str, float] = {}
        self.files: list[str] = []

    def look(self) -> None:
        from pipelines.dataset.shards import list_names, read_manifest

        now = time.time()
        if "manifest.json" in list_names(self._out):
            files = [shard.file for shard in read_manifest(self._out).shards]
            assert files[: len(self.files)] == self.files, "a published shard is gone"
            assert set(files) <= list_names(self._out), "a manifest names a shard that is not there"
            self.files = files
            for file in files:
                self.published_at.setdefault(file, now)
        for name in list_names(self._embeddings):
            if name.endswith(".parquet"):
                key = name.split("-")[2]
                self.embedded_at.setdefault(f"part-{key}.parquet", now)


def start(module: str, *flags: str, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", module, *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=log.open("ab"), stderr=subprocess.STDOUT)


def write_artifact(folder: Path, frames: int) -> None:
    from models.artifacts.artifact import save_artifact
    from models.encoders.vit import build_encoder
    from models.media.preprocessing import Preprocessing

    encoder = build_encoder("video_small", image_size=128, patch_size=16, frames=frames, tubelet=2)
    prep = Preprocessing(image_size=128, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_artifact(folder, encoder, prep, {"run": "benchmark", "step": 0, "manifest_hash": ""})


def run(film: Path, seconds: float, through: str, work: Path) -> dict:
    """The whole of it; returns what was seen."""
    out, embeddings, growing = work / "shards", work / "embeddings", work / "live.ts"
    write_artifact(work / "artifact", 16)
    where = ["--path", str(growing)] if through == "file" else []
    encoder = subprocess.Popen(
        [
            *(sys.executable, __file__, "--film", str(film), "--seconds", str(seconds)),
            *("--stream", str(work / "times.npy"), *where),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if through == "file":
        growing.touch()
        source = str(growing)
    else:
        source = f"tcp://127.0.0.1:{encoder.stdout.readline().strip()}"
    with av.open(str(film)) as opened:
        rate = opened.streams.video[0].average_rate
    flags = ["--source", source, "--out", str(out), "--follow", "--short-side", str(SHORT_SIDE)]
    flags += ["--video.fps", str(float(rate / KEEP)), "--video.segment-seconds", str(SEGMENT_S)]
    flags += ["--live.publish-seconds", str(PUBLISH_S)]
    ingest = start("pipelines.ingest", *flags, log=work / "ingest.log")
    where = ["--artifact", str(work / "artifact"), "--data", str(out), "--out", str(embeddings)]
    embed = start("pipelines.embed", *where, "--follow", "--fps", "4", log=work / "embed.log")
    time.sleep(8)  # imports
    watcher, memory, cpu = Watcher(out, embeddings), [], {}
    encoder.stdin.write("go\n")
    encoder.stdin.flush()
    began, killed = time.time(), None
    while (now := time.time() - began) < seconds:
        watcher.look()
        memory.append((now, resident_mib(ingest.pid), resident_mib(embed.pid)))
        if killed is None and now >= seconds / 2:
            cpu["ingest, first half"] = cpu_seconds(ingest.pid)
            ingest.kill()
            ingest.wait()
            killed = time.time()
            ingest = start("pipelines.ingest", *flags, log=work / "ingest.log")
        time.sleep(0.25)
    encoder.wait()
    time.sleep(1)
    cpu |= {"ingest, second half": cpu_seconds(ingest.pid), "embed": cpu_seconds(embed.pid)}
    ingest.send_signal(signal.SIGTERM)
    codes = [ingest.wait(60)]
    watcher.look()
    deadline = time.time() + 60
    while embed.poll() is None and time.time() < deadline:
        watcher.look()
        time.sleep(0.25)
    codes.append(embed.wait(5))
    watcher.look()
    times = np.load(work / "times.npy")
    return report(film, rate, seconds, watcher, times, out, embeddings) | {
        "through": through,
        "exit codes of ingest and embed": codes,
        "killed at frame": int(np.searchsorted(times, killed)),
        "CPU seconds": cpu,
        "RSS MiB": [
            {"minute": round(minute / 60, 1), "ingest": round(mib), "embed": round(other)}
            for minute, mib, other in at_times(memory, seconds)
        ],
    }


def at_times(memory: list[tuple[float, float, float]], seconds: float) -> list[tuple]:
    """Ten readings, evenly; each is the last before its time."""
    marks = np.arange(1, 11) * seconds / 10
    return [max(entry for entry in memory if entry[0] <= mark) for mark in marks]


def report(
    film: Path,
    rate: Fraction,
    seconds: float,
    watcher: Watcher,
    times: np.ndarray,
    out: Path,
    embeddings: Path,
) -> dict:
    """Reads all that was published, and compares it with what was streamed."""
    import pyarrow.parquet as pq

    from models.media.videos import decode_frames
    from pipelines.dataset.shards import read_rows, verify_shards

    manifest = verify_shards(out)
    with av.open(str(film)) as opened:
        width, height = opened.streams.video[0].width, opened.streams.video[0].height
    shard_of = [shard.file for shard in manifest.shards for _ in range(shard.rows)]
    rows, numbers, first, last, arrival, embedded = read_rows(out).to_pylist(), [], [], [], [], []
    for row, file in zip(rows, shard_of, strict=True):
        frames = decode_frames(row["video"], range(row["num_frames"]))
        found = [number_of(frame, width) for frame in frames]
        numbers += found
        first.append(watcher.published_at[file] - times[found[0]])
        last.append(watcher.published_at[file] - times[found[-1]])
        arrival.append(row["recorded_at"].timestamp() - times[found[0]])
        embedded.append(watcher.embedded_at[file] - times[found[-1]])
    steps = np.diff(numbers)
    gaps = [
        {"after frame": int(numbers[i]), "seconds": round(float((steps[i] - KEEP) / rate), 2)}
        for i in np.flatnonzero(steps != KEEP)
    ]
    done = [id_ for f in embeddings.glob("*.parquet") for id_ in pq.read_table(f)["sample_id"]]
    return {
        "source": f"{width}x{height}, {float(rate):g} frames/s",
        "stored": f"{rows[0]['width']}x{rows[0]['height']}, {rows[0]['fps']:g} frames/s",
        "streamed s": seconds,
        "published s": round(manifest.num_frames / rows[0]["fps"], 2),
        "before the first frame s": round(numbers[0] / float(rate), 2),
        "after the last frame s": round((len(times) - KEEP - numbers[-1]) / float(rate), 2),
        "gaps": gaps,
        "doubled frames": len(numbers) - len(set(numbers)),
        "doubled segments": len(rows) - len({row["sample_id"] for row in rows}),
        "segments": len(rows),
        "shards": len(manifest.shards),
        "embedded": len(set(done)),
        "embedded twice": len(done) - len(set(done)),
        "not embedded": len({row["sample_id"] for row in rows} - {i.as_py() for i in done}),
        "losses": manifest.losses,
        "latest frame of the encoder s": round(float(np.max(np.diff(times)) - 1 / rate), 3),
        "lag s, to arrival": quantiles(arrival),
        "lag s, a segment's first frame to published": quantiles(first),
        "lag s, a segment's last frame to published": quantiles(last),
        "lag s, a segment's last frame to embedded": quantiles(embedded),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    p50, most = np.quantile(values, (0.5, 1.0)).round(2).tolist()
    return {"p50": p50, "max": most}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--film", type=Path, required=True, help="see `pipelines.fetch samples`")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--through", choices=("tcp", "file"), default="tcp")
    parser.add_argument("--work", type=Path, help="kept; default: a temporary folder, removed")
    parser.add_argument("--stream", type=Path, help="be the encoder, and write frame times here")
    parser.add_argument("--path", type=Path, help="with --stream: into this file")
    options = parser.parse_args()
    if options.stream:
        stream(options.film, options.seconds, options.stream, options.path)
        return
    print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="live-bench-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = run(options.film, options.seconds, options.through, work)
        print(json.dumps(found, indent=1))
        for name in ("ingest.log", "embed.log"):
            print(f"\n{name}, end:\n", "".join((work / name).read_text().splitlines(True)[-12:]))
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
