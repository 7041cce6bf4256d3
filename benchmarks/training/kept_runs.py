"""A run of objectives.py that continues after a kill, with its length and its CPU time."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class KeptRun:
    """The checkpoint store of one run, which keeps only the newest."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._record = folder / "run.json"
        self._values: dict[str, Any] = {"steps": None, "cpu_seconds": 0.0, "newest": None}
        if self._record.exists():
            self._values = json.loads(self._record.read_text())
        self._before = self._values["cpu_seconds"]
        self._start = time.process_time()

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint; None before the first."""
        name = self._values["newest"]
        return self.folder / name if name else None

    def steps(self, estimate: Callable[[], int]) -> int:
        """The run's length, asked for only once in its life. CPU time counts from here on."""
        if self._values["steps"] is None:
            self._values["steps"] = estimate()
            self._write()
        self._start = time.process_time()
        return self._values["steps"]

    @property
    def cpu_seconds(self) -> float:
        """CPU time of this process and of those before it, up to their last checkpoints."""
        return self._before + time.process_time() - self._start

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        yield self.newest

    def save(self, write: Callable[[Path], None], metrics: dict[str, Any]) -> None:
        folder = self.folder / f"checkpoint_{metrics['step']:08d}"
        # What a process killed while it wrote has left; the record never named it.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(folder)
        before = self.newest
        self._values |= {"cpu_seconds": self.cpu_seconds, "newest": folder.name}
        self._write()
        if before and before != folder:
            shutil.rmtree(before)

    def _write(self) -> None:
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps(self._values))
        partial.replace(self._record)
