"""A run's folder: files are appended to locally and uploaded if the run's storage is remote.

Uploads are a courtesy to whoever watches a run. One that fails is tried again at the next
checkpoint, and never ends the run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from models.scratch import make_scratch
from pipelines.runtime.uris import is_local, open_uri

METRICS = "metrics.jsonl"


class RunFolder:
    """A run's folder whose files can be appended to.

    If the run is local, `local` is the run's folder itself. Object stores cannot append, so for a
    remote run `local` is a temporary folder whose files `sync` uploads whole.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._fs, self._root = open_uri(uri)
        self.remote = not is_local(self._fs)
        self._uploaded: dict[str, tuple[int, int]] = {}
        if self.remote:
            self.local = make_scratch("run")
        else:
            self.local = Path(self._root)
            self.local.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> Path:
        """Returns the local path of a file, after downloading it if it exists only remotely."""
        path = self.local / name
        if self.remote and not path.exists() and self._fs.exists(f"{self._root}/{name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(f"{self._root}/{name}", str(path))
        return path

    def sync(self, *, patient: bool = False) -> str | None:
        """Uploads the files that changed since the last call; does nothing for a local run.

        Args:
            patient: Whether to wait for S3 if it does not answer, which nobody should do between
                two steps.

        Returns:
            Why files are left that are not uploaded; None if there are none.
        """
        if not self.remote:
            return None
        fs, _ = open_uri(self.uri, patience_s=None if patient else 0)
        try:
            for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
                name, stat = path.relative_to(self.local).as_posix(), path.stat()
                if self._uploaded.get(name) != (stat.st_size, stat.st_mtime_ns):
                    fs.put_file(str(path), f"{self._root}/{name}")
                    self._uploaded[name] = (stat.st_size, stat.st_mtime_ns)
        except Exception as error:  # each storage has classes of its own
            return f"{type(error).__name__}: {error}"
        return None

    def close(self) -> None:
        """Removes the temporary folder of a remote run."""
        if self.remote:
            shutil.rmtree(self.local, ignore_errors=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl, leaving out a last line that was cut short by a kill."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise
    return rows
