"""Runs a benchmark and writes its row into its page: result, command, commit, hardware and date.

    python benchmarks/run.py                      # lists them, with what each needs
    python benchmarks/run.py sigreg
    python benchmarks/run.py step --rounds 9      # further arguments go to the benchmark
    python benchmarks/run.py all                  # those that need nothing, one after another

The row goes to the top of the table under the page's title, so that a page begins with what came
out last. A benchmark that fails writes none; with `--print` nothing is written at all. In arguments
WORK stands for a folder that is removed afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
BEGIN, END = "<!-- runs, the newest first: benchmarks/run.py -->", "<!-- end of runs -->"
HEAD = "| result | command | commit | hardware | date |\n|---|---|---|---|---|"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How a script is run, and where its row goes."""

    script: Path = Path()
    page: str = ""
    """Relative to this folder; if empty, the page of the script's name."""
    arguments: tuple[str, ...] = ()
    """Given to it unless others are."""
    needs: str = ""
    """Arguments that it does not run without, and where they come from."""
    result: str = "^result: (.*)"
    """Lines of its output that are the row's result, or the part of them in parentheses. If no line
    is such, it is the last line."""


PAGES = {
    "data": "data/loader.md",
    "language": "language/sink_lm.md",
    "serving": "serving/serving.md",
    "training": "training/step.md",
}
"""Pages of scripts without one of their own name, by folder."""

SMOLLM2 = "--model data/smollm2 (`python -m pipelines.fetch smollm2 --out data/smollm2`)"
GGUF = "--gguf, a file of data/smollm2 (`python -m pipelines.fetch smollm2 --out data/smollm2`)"
FILM = "--film FILE (`python -m pipelines.fetch samples --out DIR`)"
AGENT = "--agent FOLDER, OUT/agent of `python -m pipelines.plan_episodes`"
GAMES = "--footage FOLDER (`python -m pipelines.fetch gameplay`)"
CIFAR10 = "--cifar10 FOLDER (`python -m pipelines.fetch cifar10 --out FOLDER`)"

KNOWN = {
    "against_torchcodec": Benchmark(
        needs=f"torchcodec, and {FILM.replace('--film FILE', '--films FILES')}",
        page="data/decode.md",
        result=r"^\| ours .*",
    ),
    "decode": Benchmark(needs=f"--work FOLDER and, once, {FILM} --prepare"),
    "edges": Benchmark(needs=f"{GAMES}, --work FOLDER", page="training/grids.md"),
    "endless": Benchmark(arguments=("--tokens", "200000")),
    "gameplay": Benchmark(needs="--checkpoint, --data, --shards and --out, see gameplay.md"),
    "grids": Benchmark(result=r"^\| (?:rectangle|padded) .*"),
    "hud": Benchmark(needs=f"{GAMES}, --work FOLDER"),
    "hyperoptim": Benchmark(arguments=("time",)),
    "hyperoptim_lr": Benchmark(arguments=("show",), page="training/hyperoptim.md"),
    "ingest": Benchmark(needs=f"{CIFAR10}, --work FOLDER"),
    "live": Benchmark(needs=FILM),
    "noise": Benchmark(needs=CIFAR10.replace("--cifar10", "--data")),
    "measure": Benchmark(
        needs="--what and --folder, with a run of runs.py there", page="beliefs/beliefs.md"
    ),
    "objectives": Benchmark(
        arguments=("--seconds", "200", "--seeds", "0", "--out", "WORK/rows.jsonl")
    ),
    "objectives_plot": Benchmark(
        arguments=("--rows", "benchmarks/training/objectives.jsonl", "--out", "WORK/plot.png"),
        page="training/objectives.md",
    ),
    "our_endpoint": Benchmark(needs="--folder FOLDER and --port PORT; serving.py starts it"),
    "peer_infinity": Benchmark(needs="an environment with infinity; serving.py starts it"),
    "peer_llama_cpp": Benchmark(needs=GGUF),
    "peer_mlx": Benchmark(needs="an environment with mlx-lm"),
    "peer_transformers": Benchmark(needs=GGUF),
    "plain_app": Benchmark(needs="--artifact FOLDER and --port PORT; serving.py starts it"),
    "plan_run": Benchmark(arguments=("--out", "WORK", "--rounds", "1", "--without-ray")),
    "plan_scale": Benchmark(arguments=("--rows", "1e8", "--shards", "1e4", "--workers", "64")),
    "planning": Benchmark(needs=AGENT),
    "runs": Benchmark(needs="--what and --folder, see beliefs.md", page="beliefs/beliefs.md"),
    "sessions_http": Benchmark(needs=SMOLLM2),
    "sharded_memory": Benchmark(arguments=("ijepa_vitl16", "--rows", "32"), result="^\\| ijepa.*"),
    "sigreg": Benchmark(result=".*times as fast.*"),
    "sink_lm": Benchmark(needs=SMOLLM2),
    "video_streams": Benchmark(page="serving/streams.md"),
    "vjepa_loop": Benchmark(needs="--cache FILE, see vjepa.md", page="training/vjepa.md"),
}
"""What is to be known of a script beside its name, if anything."""


def benchmarks() -> dict[str, Benchmark]:
    """Returns every script in the folders beside this file that can be run, by name."""
    found = {}
    for script in sorted(FOLDER.glob("*/*.py")):
        if "__main__" in script.read_text():
            known = KNOWN.get(script.stem, Benchmark())
            folder = script.parent.name
            own = script.with_suffix(".md").exists()
            page = known.page or (f"{folder}/{script.stem}.md" if own else PAGES[folder])
            found[script.stem] = dataclasses.replace(known, script=script, page=page)
    return found


def run(benchmark: Benchmark, given: Sequence[str]) -> str | None:
    """Runs a benchmark, shows what it prints, and returns its row; None if it failed."""
    arguments = list(given) or list(benchmark.arguments)
    name = os.path.relpath(benchmark.script, ROOT)
    command = shlex.join(["python", name, *arguments])
    print(f"$ {command}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        put = [argument.replace("WORK", work) for argument in arguments]
        lines, code = _shown([sys.executable, str(benchmark.script), *put])
    if code:
        print(f"{name} ended with {code}: no row is written")
        return None
    result = result_of(lines, benchmark.result)
    cells = [result, f"`{command}`", commit(), hardware(), str(dt.date.today())]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(command: list[str]) -> tuple[list[str], int]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        return lines, process.wait()
    finally:
        process.terminate()  # if this process is stopped, the benchmark does not go on alone


def result_of(lines: Sequence[str], pattern: str) -> str:
    """Returns the lines of an output that are its result, without the bars of tables."""
    matches = [found for line in lines if (found := re.search(pattern, line))]
    texts = [found[1] if found.re.groups else found[0] for found in matches]
    texts = texts or [line for line in lines if line.strip()][-1:]
    return "; ".join(", ".join(filter(None, map(str.strip, re.split("[|│]", t)))) for t in texts)


def commit() -> str:
    """Returns the commit, and whether anything but documents differs from it."""
    short = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "--", ":!*.md")
    return f"{short} with changes" if changed else short


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def hardware() -> str:
    """Returns the processor, the GPU if there is one, torch's version, and how busy it was."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} cores of {_processor()}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}, load {os.getloadavg()[1]:.1f}"])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def write(page: Path, row: str) -> None:
    """Puts a row at the top of the page's table, which is made under the title if there is none."""
    text = page.read_text()
    if BEGIN not in text:
        title, _, rest = text.partition("\n")
        text = f"{title}\n\n{BEGIN}\n\n{HEAD}\n\n{END}\n{rest}"
    page.write_text(text.replace(f"{HEAD}\n", f"{HEAD}\n{row}\n", 1))


def page_of(benchmark: Benchmark) -> str:
    """Returns the page's path in the repository."""
    return os.path.relpath(FOLDER / benchmark.page, ROOT)


def show(found: dict[str, Benchmark]) -> None:
    """Prints every benchmark with its page and what it needs."""
    for name, benchmark in found.items():
        needs = f"; needs {benchmark.needs}" if benchmark.needs else ""
        print(f"{name}: {page_of(benchmark)}{needs}")


def main() -> None:
    """Runs what is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a benchmark, or all; none lists them")
    parser.add_argument("--print", action="store_true", help="print the row, and write nothing")
    args, given = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = benchmarks()
    if args.name is None:
        return show(found)
    if args.name not in {*found, "all"}:
        sys.exit(f"error: no benchmark {args.name!r}; one of all, {', '.join(found)}")
    chosen = (
        [b for b in found.values() if not b.needs] if args.name == "all" else [found[args.name]]
    )
    if args.name != "all" and chosen[0].needs and not given:
        sys.exit(f"error: {args.name} needs {chosen[0].needs}")
    failed = 0
    for benchmark in chosen:
        row = run(benchmark, given if args.name != "all" else ())
        failed += row is None
        if row is not None and not args.print:
            write(ROOT / page_of(benchmark), row)
            print(f"written into {page_of(benchmark)}:")
        print(row or "")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
