"""Compiles and loads the kernels, where there is a compiler and a processor that they are for.

The library is built once for each version of its source, in 2 seconds, and kept in the user's cache
(`XDG_CACHE_HOME`, else `~/.cache`). Processes that build it at the same time, on several nodes with
one home directory perhaps, each write a file of their own and rename it: the last one stays, and
all are the same. The library calls neither Python nor torch, so that it needs neither's headers,
and any version of them will do.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
MAIN = SOURCES / "decode_step.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
)

log = logging.getLogger(__name__)


class NoKernels(RuntimeError):
    """The kernels cannot run here; the message says why."""


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the library, after building it if nobody has yet.

    Raises:
        NoKernels: the processor lacks AVX-512 VNNI, or there is no C++ compiler, or it fails.
    """
    if platform.system() != "Linux" or not torch.cpu._is_vnni_supported():
        raise NoKernels("they need Linux on an x86-64 processor with AVX-512 VNNI")
    path = built()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernels(f"{path} cannot be loaded: {error}") from error


def built() -> Path:
    """Returns the library's file, which is compiled if it is not there, on any x86-64 processor.

    Raises:
        NoKernels: there is no C++ compiler, or it fails.
    """
    path = _cache() / f"kernels-{_version()}.so"
    if not path.exists():
        _build(path)
    return path


def _version() -> str:
    """Returns a digest of everything that the library is made from, and for."""
    made_for = (*FLAGS, os.confstr("CS_GNU_LIBC_VERSION") or "")
    digest = hashlib.sha256(" ".join(made_for).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cache() -> Path:
    """Returns a folder of this user alone: what lies there is executed."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "rayjepa"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # no home, or a read-only one
        return _temporary()


@functools.cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="rayjepa-kernels-"))


def _build(path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NoKernels("there is no C++ compiler (g++, or the one that CXX names)")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler.split(), *FLAGS, str(MAIN), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise NoKernels(f"{compiler} fails: {told[0] if told else error}") from error
        made.replace(path)
    log.info("built %s in %.1f s", path, time.perf_counter() - started)


if __name__ == "__main__":  # while an image is made, perhaps on another processor
    print(built())
