"""Rows of the fault table, as the tests see them.

RAYJEPA_FAULT_ROWS=rows.jsonl pytest -n 0 tests/cluster
python tests/helpers/cluster/report.py rows.jsonl         # prints them as a table in Markdown
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

ROWS = "RAYJEPA_FAULT_ROWS"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One fault and what became of it."""

    number: str
    fault: str
    happened: str
    lost: str
    recovery_s: float | None
    """Seconds from the fault to the next sign of work; None where nothing had to recover."""
    message: str
    test: str


def record(row: Row) -> None:
    """Prints a row, and appends it to the file that the environment names."""
    print(row)
    if path := os.environ.get(ROWS):
        with Path(path).open("a") as file:
            load = {"load": os.getloadavg()[0], "time": time.time()}
            file.write(json.dumps(dataclasses.asdict(row) | load) + "\n")


TELLS = re.compile(r"^(WARNING|error|going on|waiting|resuming)[^\n]*$", re.MULTILINE)
"""How lines of ours about losses and recoveries begin."""


def told_in(log: str) -> str:
    """Returns the first line about a loss or a recovery; nothing if there is none."""
    found = TELLS.search(log)
    return found[0] if found else ""


def record_job(
    number: str, fault: str, happened: str, lost: str, recovery_s: float | None, log: str, test: str
) -> None:
    """As `record`, with the message that a job's output holds."""
    row = Row(
        number=number,
        fault=fault,
        happened=happened,
        lost=lost,
        recovery_s=recovery_s,
        message=told_in(log),
        test=test,
    )
    record(row)


def table(rows: list[dict[str, object]]) -> str:
    """Returns rows as Markdown; of several with one number and test, the newest."""
    newest = {(row["number"], row["test"]): row for row in rows}
    lines = ["| # | Fault | What happened | Lost | Recovery s | What the user sees | Test |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in newest.values():
        seconds = row["recovery_s"]
        told = f"`{row['message']}`" if row["message"] else ""
        cells = [row["number"], row["fault"], row["happened"], row["lost"]]
        cells += ["" if seconds is None else f"{seconds:.0f}", told, f"`{row['test']}`"]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
