"""Compiles and loads the kernels, where there is a compiler and a processor that they are for.

The library is built once for each version of its source, in 2 seconds, and kept in the user's cache
(`XDG_CACHE_HOME`, else `~/.cache`), which may be read-only once it is there. It ends with its own
digest, so that one that is damaged or cut off is built anew and never loaded. Processes that build
it at the same time, on several nodes with one home directory perhaps, each write a file of their
own and rename it: the last one stays, and all are the same. The library calls neither Python nor
torch, so that it needs neither's headers, and any version of them will do.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from models.scratch import scratch

SOURCES = Path(__file__).parent
MAIN = SOURCES / "decode_step.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
)

FUNCTIONS = ("multiply_matrix", "decode_step")
"""What the library must have."""
DIGEST = hashlib.sha256().digest_size
"""Bytes at the end of the library that its loader passes over."""
COMPILE_S = 300.0
"""Seconds after which a compiler counts as stuck."""

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
    kept = _kept()
    if kept is not None and _is_whole(kept):
        return _loaded(kept)
    with _compiled() as made:
        return _loaded(kept if kept is not None and _keep(made, kept) else made)


def built() -> Path:
    """Returns the library's file in the cache, which is compiled if it is not there, on any x86-64
    processor.

    Raises:
        NoKernels: there is no C++ compiler, or it fails, or the cache cannot be written.
    """
    kept = _kept()
    if kept is None:
        raise NoKernels("there is no home to keep them in (HOME, or XDG_CACHE_HOME)")
    if not _is_whole(kept):
        with _compiled() as made:
            if not _keep(made, kept):
                raise NoKernels(f"{kept.parent} cannot be written")
    return kept


def _kept() -> Path | None:
    """Returns where this user's library is kept; None without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(home).expanduser() / "rayjepa" / f"kernels-{_version()}.so"
    except RuntimeError:
        return None


def _version() -> str:
    """Returns a digest of everything that the library is made from, and for."""
    made_for = (*FLAGS, os.confstr("CS_GNU_LIBC_VERSION") or "")
    digest = hashlib.sha256(" ".join(made_for).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    """Whether a library of this user, or of root, is there to its end: what lies there is run."""
    try:
        data, owner = path.read_bytes(), path.stat().st_uid
    except OSError:
        return False
    return owner in (0, os.getuid()) and data[-DIGEST:] == hashlib.sha256(data[:-DIGEST]).digest()


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernels(f"{path} cannot be loaded: {error}") from error
    missing = [name for name in FUNCTIONS if not hasattr(found, name)]
    if missing:
        raise NoKernels(f"{path} has no {' and no '.join(missing)}: is CXX a C++ compiler?")
    return found


@contextlib.contextmanager
def _compiled() -> Iterator[Path]:
    """Yields a library that is removed again at the end of the block; loaded, it works on."""
    compiler = os.environ.get("CXX", "").strip() or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NoKernels("there is no C++ compiler (g++, or the one that CXX names)")
    started = time.perf_counter()
    try:
        with scratch("kernels") as folder:
            made = folder / "kernels.so"
            _compile(compiler, made)
            data = made.read_bytes()
            made.write_bytes(data + hashlib.sha256(data).digest())
            log.info("built the kernels in %.1f s", time.perf_counter() - started)
            yield made
    except OSError as error:  # no room, or no folder for temporary files
        raise NoKernels(f"they cannot be built: {error}") from error


def _compile(compiler: str, made: Path) -> None:
    command = [*compiler.split(), *FLAGS, str(MAIN), "-o", str(made)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NoKernels(f"{compiler} fails: {told[0] if told else error}") from error
    if not made.is_file():
        raise NoKernels(f"{compiler} fails: it has written nothing")


def _keep(made: Path, kept: Path) -> bool:
    """Copies a library into the cache; returns whether that can be written."""
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as folder:
            part = Path(folder) / kept.name
            with part.open("wb") as file:
                file.write(made.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            part.replace(kept)
    except OSError as error:
        log.warning("kernels are not kept, so every process builds its own: %s", error)
        return False
    return True


if __name__ == "__main__":  # while an image is made, perhaps on another processor
    try:
        print(built())
    except NoKernels as told:
        sys.exit(f"error: {told}")
