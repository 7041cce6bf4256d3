"""Jobs that are done once: a job with a result in the work folder is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def once(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result stored at `path`, or runs the job and stores what it returns.

    The file also gets when, how long and at which load it ran, and of which commit the code was.
    """
    if path.exists():
        return dict(json.loads(path.read_text()))
    print(f"{time.strftime('%H:%M:%S')} {path.stem}", flush=True)
    start, load = time.time(), os.getloadavg()[0]
    result = run()
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": round(time.time() - start, 1),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "commit": commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result | {"facts": facts}, indent=1))
    partial.replace(path)
    return result | {"facts": facts}


def commit() -> str:
    """Returns the commit that is checked out, with a plus sign if files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def command(module: str, *arguments: object, log: Path, prefix: tuple[str, ...]) -> dict[str, Any]:
    """Runs `python -m pipelines.MODULE` with its output in a log.

    Raises:
        RuntimeError: the command failed; the end of its log is in the message.
    """
    words = [sys.executable, "-m", f"pipelines.{module}", *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as out:
        done = subprocess.run(
            [*prefix, *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{log.read_text()[-2000:]}")
    return {"command": " ".join(["python", *words[1:]])}
