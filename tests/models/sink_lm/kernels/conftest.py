"""What the tests of the kernels share."""

from __future__ import annotations

import pytest

from models.sink_lm.kernels.build import NoKernels, library


@pytest.fixture(scope="session")
def kernels() -> None:
    """Skips where they cannot run; builds them if need be."""
    try:
        library()
    except NoKernels as error:
        pytest.skip(str(error))
