"""S3 that waits out what passes by itself: refused connections, resets, timeouts, 5xx, throttling.

A request is repeated for minutes, with growing and random pauses, and slower while S3 throttles
(botocore's adaptive mode). What waiting cannot mend is raised at once: denied access, missing
buckets and keys, wrong or expired credentials. s3fs alone gives up after 6 to 8 s and does not
repeat refused connections or 500s at all.

Code that opens S3 goes through `url_to_fs`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from typing import Any

from aiohttp import ClientError as HttpError
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import _error_wrapper

PATIENCE_ENV = "RAYJEPA_S3_PATIENCE_S"
PATIENCE_S = 300.0
"""Seconds for which a request is repeated, unless `PATIENCE_ENV` says otherwise."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
SAY_AFTER_S = 10.0
"""Seconds after which a warning says that S3 is waited for."""
CONFIG = {"connect_timeout": 5, "read_timeout": 30}
TRIES = 3
"""Tries of botocore itself within each of ours."""
PASSING = (boto.HTTPClientError, boto.ConnectionError, HttpError, OSError, ResponseParserError)
PASSING_CODES = {
    *("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"),
    *("BandwidthLimitExceeded", "XAmzContentSHA256Mismatch"),
}
"""Codes of errors that pass, beside those whose HTTP status is 429 or at least 500."""
NOT_IMPLEMENTED = 501
log = logging.getLogger(__name__)


def passes(error: BaseException) -> bool:
    """Whether an error of S3 or of the network may be gone when the request is repeated."""
    origin = error.__cause__ if isinstance(error.__cause__, boto.ClientError) else error
    if isinstance(origin, boto.ClientError):
        status = origin.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        passing = status == 429 or (status >= 500 and status != NOT_IMPLEMENTED)
        return passing or origin.response["Error"]["Code"] in PASSING_CODES
    if isinstance(origin, FileNotFoundError | PermissionError | FileExistsError | boto.SSLError):
        return False
    return isinstance(origin, PASSING)


class PatientS3FileSystem(S3FileSystem):  # type: ignore[misc]
    """s3fs's file system with patience; pickles and workers keep it.

    Args:
        patience_s: Seconds for which a request is repeated; None means `PATIENCE_ENV`, or
            `PATIENCE_S`.
        options: Those of s3fs.
    """

    retries = 10  # of a body that breaks off: each asks anew, with all of the patience

    def __init__(self, *args: Any, patience_s: float | None = None, **options: Any) -> None:
        tries = 1 if patience_s == 0 else TRIES
        config = CONFIG | {"retries": {"mode": "adaptive", "total_max_attempts": tries}}
        options["config_kwargs"] = config | (options.get("config_kwargs") or {})
        super().__init__(*args, **options)
        self._patience_s = patience_s

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        started, pause, said = time.monotonic(), FIRST_PAUSE_S, False
        while True:
            try:
                return await self._try_s3(method, *args, **kwargs)
            except Exception as error:
                waited = time.monotonic() - started
                if not passes(error) or waited >= self._patience():
                    raise
                if waited >= SAY_AFTER_S and not said:
                    log.warning("S3 does not answer (%s); trying on", error)
                    said = True
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _try_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Does what `S3FileSystem._call_s3` does, without its own repetitions."""
        await self.set_session()
        call = getattr(await self.get_s3(kwargs.get("Bucket")), method)
        arguments = self._get_s3_method_kwargs(call, *args, **kwargs)
        return await _error_wrapper(call, kwargs=arguments, retries=1)

    call_s3 = sync_wrapper(_call_s3)  # open files call this one

    def _patience(self) -> float:
        if self._patience_s is not None:
            return self._patience_s
        return float(os.environ.get(PATIENCE_ENV, PATIENCE_S))


# Whoever makes s3fs forget its instances means these too.
PatientS3FileSystem._cache = S3FileSystem._cache
