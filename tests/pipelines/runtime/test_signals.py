"""SIGTERM ends a job in order, also where C code has put a handler of its own in place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.repository import ROOT

CODE = """
import ctypes, signal, threading, time
from pipelines.runtime.signals import ending_in_order, stop_on_signals

def overwritten():  # as by ray.init: SIG_DFL, without Python's knowledge
    with ending_in_order():
        ctypes.CDLL(None).signal(signal.SIGTERM, None)

def event():
    with stop_on_signals() as stop:
        overwritten()
        print("begun", flush=True)
        print(stop.wait(60), flush=True)

def job():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("let go", flush=True)
"""
ORDERLY = "error: stopped by SIGTERM; the same command goes on from what is done\n"


@pytest.mark.parametrize(
    ("work", "code", "out", "err"),
    [
        ("overwritten(); job()", 1, "let go\n", ORDERLY),
        ("event()", 0, "True\n", ""),
        ("ctypes.CDLL(None).signal(signal.SIGTERM, None); job()", -15, "", ""),
    ],
    ids=["in order", "as an event", "without it"],
)
def test_what_a_job_does_at_sigterm(work: str, code: int, out: str, err: str) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", f"{CODE}\n{work}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.terminate()
    assert job.communicate(timeout=60) == (out, err)
    assert job.returncode == code
