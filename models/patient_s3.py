"""S3 that waits out what passes by itself: refused connections, resets, timeouts, 5xx, throttling.

A request is repeated for minutes, with growing and random pauses. botocore's adaptive mode, which
slows all requests of a process down, would take one error in ten for throttling and read ten
objects a second. A body is part of its request: one that breaks off or trickles is asked for again.
What waiting cannot mend is raised at once: denied access, missing buckets and keys, wrong or
expired credentials, another region, a wrong clock. s3fs alone gives up after 6 to 8 s and does not
repeat refused connections or 500s at all.

Code that opens S3 goes through `models.file_systems.url_to_fs`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable
from typing import Any

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import _error_wrapper

from models.s3_errors import CREDENTIALS, code_of, named, passes, status_of
from models.s3_waiting import Outages

PATIENCE_ENV = "RAYJEPA_S3_PATIENCE_S"
PATIENCE_S = 300.0
"""Seconds for which a request is repeated, unless `PATIENCE_ENV` says otherwise."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
CONFIG = {"connect_timeout": 5, "read_timeout": 30, "max_pool_connections": 32}
QUICK = {"connect_timeout": 3, "read_timeout": 10}
"""What replaces them where a caller has less patience than `QUICK_S`."""
QUICK_S = 10.0
BODY_S, SLOWEST = 60.0, 16_384
"""A body may take these seconds, and one more for each so many bytes."""
CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")
"""Settings of botocore. By default it checks more than other servers than AWS's understand: rclone
sends the checksum of the whole file with every part of it."""
OUTAGES = Outages()
_HEADS = {"head_object": "get_object", "head_bucket": "list_objects_v2"}
"""Requests whose answers have no body that could say why they are refused, and what can."""


class PatientS3FileSystem(S3FileSystem):  # type: ignore[misc]
    """s3fs's file system with patience; pickles and workers keep it.

    Args:
        patience_s: Seconds for which a request is repeated; None means `PATIENCE_ENV`, or
            `PATIENCE_S`.
        options: Those of s3fs.
    """

    retries = 1  # of s3fs itself: bodies, too, are repeated by `_call_s3`

    def __init__(self, *args: Any, patience_s: float | None = None, **options: Any) -> None:
        quick = QUICK if patience_s is not None and patience_s < QUICK_S else {}
        config = CONFIG | quick | {"retries": {"mode": "standard", "total_max_attempts": 1}}
        options["config_kwargs"] = config | (options.get("config_kwargs") or {})
        super().__init__(*args, **options)
        self._patience_s = patience_s

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._prepare_config_kwargs()
        named = self.endpoint_url, *map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
        if any(endpoint and "amazonaws.com" not in endpoint for endpoint in named):
            unset = [name for name in CHECKSUMS if f"AWS_{name.upper()}" not in os.environ]
            config = dict.fromkeys(unset, "when_required") | config
        return config

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        started, pause, renewed = time.monotonic(), FIRST_PAUSE_S, False
        while True:
            try:
                answer = await self._try_s3(method, *args, **kwargs)
                OUTAGES.answered(self._endpoint)
                return answer
            except Exception as error:
                waited = time.monotonic() - started
                if code_of(error) in CREDENTIALS and not renewed:
                    renewed = True
                    if await self._renew():
                        continue
                if not passes(error):
                    OUTAGES.answered(self._endpoint)
                    if pause > FIRST_PAUSE_S and await self._was_completed(method, error, kwargs):
                        return {}
                    raise named(error, _uri(kwargs)) from error.__cause__
                OUTAGES.failed(self._endpoint, error, self._gives_up())
                if waited >= self._patience():
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _try_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Does what `S3FileSystem._call_s3` does, without its own repetitions; reads bodies."""
        await self.set_session()
        call = getattr(await self.get_s3(kwargs.get("Bucket")), method)
        arguments = self._get_s3_method_kwargs(call, *args, **kwargs)
        try:
            answer = await _error_wrapper(call, kwargs=arguments, retries=1)
        except OSError as error:
            told = await self._telling(method, error, kwargs)
            raise told from told.__cause__
        except RecursionError:  # botocore asks for the region, and is sent on by that answer too
            text = f"sent elsewhere without an end (PermanentRedirect: {_uri(kwargs)})"
            raise PermissionError(text) from None
        if method == "get_object":
            size = int(answer.get("ContentLength") or 0)
            if "Range" in arguments or size <= self.default_block_size:
                answer["Body"] = await _received(answer["Body"], size)
        return answer

    call_s3 = sync_wrapper(_call_s3)  # open files call this one

    async def _telling(self, method: str, error: OSError, kwargs: dict[str, Any]) -> OSError:
        """Returns the error that says why a HEAD was refused: its own answer has a status only."""
        if method not in _HEADS or status_of(error) not in (400, 403):
            return error
        at = {name: kwargs[name] for name in ("Bucket", "Key") if name in kwargs}
        least = {"Range": "bytes=0-0"} if "Key" in at else {"MaxKeys": 1}
        call = getattr(await self.get_s3(at["Bucket"]), _HEADS[method])
        try:
            answer = await _error_wrapper(call, kwargs=at | least, retries=1)
        except OSError as telling:
            return telling if code_of(telling) else error
        if "Body" in answer:
            answer["Body"].close()
        return error

    async def _renew(self) -> bool:
        """Reads the credentials anew, as from a file; whether they are others than before."""
        if self.key or self.anon:
            return False
        before = await self._credentials()
        await self.set_session(refresh=True)
        return bool(before) and await self._credentials() != before

    async def _credentials(self) -> Any:
        found = await self.session.get_credentials()
        return found and await found.get_frozen_credentials()

    async def _was_completed(self, method: str, error: Exception, kwargs: dict[str, Any]) -> bool:
        """Whether an upload was completed by a request whose answer was lost."""
        if method != "complete_multipart_upload" or code_of(error) != "NoSuchUpload":
            return False
        parts = [part["ETag"].strip('"') for part in kwargs["MultipartUpload"]["Parts"]]
        digest = hashlib.md5(b"".join(map(bytes.fromhex, parts))).hexdigest()
        try:
            found = await self._call_s3("head_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"])
        except FileNotFoundError:
            return False
        return bool(found["ETag"].strip('"') == f"{digest}-{len(parts)}")

    @property
    def _endpoint(self) -> str:
        return str(self._s3.meta.endpoint_url) if self._s3 is not None else "S3"

    def _gives_up(self) -> str:
        seconds = self._patience_s if self._patience_s else _usual_patience()
        return f"gives up after {seconds:.0f} s ({PATIENCE_ENV})"

    def _patience(self) -> float:
        return _usual_patience() if self._patience_s is None else self._patience_s

    async def _cat_file(
        self,
        path: str,
        version_id: str | None = None,
        start: int | None = None,
        end: int | None = None,
        **options: Any,
    ) -> bytes:
        """Reads a file by one request; one that is larger than a block, by one for each block."""
        if start is not None or end is not None:
            try:
                data: bytes = await super()._cat_file(path, version_id, start, end, **options)
            except OSError as error:
                if status_of(error) != 416:
                    raise
                return b""  # no byte there, as a local file answers
            return data
        bucket, key, version = self.split_path(path)
        at = {"Bucket": bucket, "Key": key}
        if version_id or version:
            at["VersionId"] = version_id or version
        answer = await self._call_s3("get_object", **at)
        body, size = answer["Body"], int(answer["ContentLength"])
        if isinstance(body, _Body):
            return body.data
        body.close()
        block, at_once = self.default_block_size, self.max_concurrency
        data = await self._cat_file_concurrent(
            bucket, key, size, block, max_concurrency=at_once, version_id=at.get("VersionId")
        )
        return data

    async def _exists(self, path: str) -> bool:
        """As s3fs, which takes a bucket for missing when S3 does not answer, or refuses."""
        bucket, key, _ = self.split_path(self._strip_protocol(path))
        if key or not bucket:
            return bool(await super()._exists(path))
        try:
            await self._call_s3("head_bucket", Bucket=bucket)
        except FileNotFoundError:
            return False
        except PermissionError as error:
            if code_of(error) not in ("AccessDenied", "403"):
                raise
        return True

    exists = sync_wrapper(_exists)

    async def _find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool | None = None,
        detail: bool = False,
        prefix: str = "",
        on_page: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Any:
        """As s3fs, whose time grows with the square of the number of folders.

        Args:
            path: Bucket and prefix.
            maxdepth: As in s3fs, which then does it; so with the two after it.
            withdirs: See there.
            prefix: See there.
            detail: Whether a dict with size, ETag and time of each file is returned.
            on_page: Takes the number of files found so far, after every page of 1,000.
            options: Those of s3fs.
        """
        if maxdepth or withdirs or prefix or self.version_aware:
            options |= {"maxdepth": maxdepth, "withdirs": withdirs, "prefix": prefix}
            return await super()._find(path, detail=detail, **options)
        bucket, key, _ = self.split_path(self._strip_protocol(path))
        if not bucket:
            raise ValueError("Cannot traverse all of S3")
        below = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", **self.req_kw}
        found: dict[str, dict[str, Any]] = {}
        async for page in self._list_pages("list_objects_v2", **below):
            infos = [_info_of(bucket, each) for each in page.get("Contents", [])]
            found |= {info["name"]: info for info in infos}
            if on_page is not None:
                on_page(len(found))
        if not found and key:
            with contextlib.suppress(FileNotFoundError):
                info = await self._info(path)  # of one file
                found = {info["name"]: info}
        return found if detail else list(found)

    find = sync_wrapper(_find)

    async def _abort_uploads(self, path: str) -> int:
        bucket, key, _ = self.split_path(self._strip_protocol(path))
        below: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
        count = 0
        while True:
            page = await self._call_s3("list_multipart_uploads", **below)
            for upload in page.get("Uploads", []):
                if upload["Key"].startswith(below["Prefix"]):
                    with contextlib.suppress(FileNotFoundError):  # it has just been completed
                        await self._abort_mpu(bucket, upload["Key"], upload["UploadId"])
                        count += 1
            if not page.get("IsTruncated"):
                return count
            markers = ("KeyMarker", "UploadIdMarker")
            below |= {marker: page[f"Next{marker}"] for marker in markers}

    abort_uploads = sync_wrapper(_abort_uploads)
    """Ends all unfinished uploads below a path, whose parts are kept and billed; says how many."""


def _usual_patience() -> float:
    return float(os.environ.get(PATIENCE_ENV, PATIENCE_S))


def _uri(kwargs: dict[str, Any]) -> str:
    names = (kwargs.get("Bucket"), kwargs.get("Key") or kwargs.get("Prefix"))
    return "s3://" + "/".join(str(name) for name in names if name)


def _info_of(bucket: str, listed: dict[str, Any]) -> dict[str, Any]:
    """Returns of a listed object what anybody asks for: every other field costs memory."""
    kept: dict[str, Any] = {n: listed[n] for n in ("ETag", "LastModified") if n in listed}
    name = f"{bucket}/{listed['Key']}"
    return {"name": name, "type": "file", "size": listed["Size"], **kept}


class _Body:
    """A body that is here already, with what s3fs calls of a body."""

    def __init__(self, data: bytes) -> None:
        self.data, self._place = data, 0

    async def read(self, size: int = -1) -> bytes:
        end = len(self.data) if size is None or size < 0 else self._place + size
        start, self._place = self._place, min(end, len(self.data))
        return self.data if (start, end) == (0, len(self.data)) else self.data[start:end]

    def close(self) -> None:
        """Does nothing."""


async def _received(body: Any, size: int) -> _Body:
    """Reads a body in the time that it may take.

    Raises:
        TimeoutError: It trickles.
    """
    try:
        async with asyncio.timeout(BODY_S + size / SLOWEST):
            return _Body(await body.read())
    finally:
        body.close()


# Whoever makes s3fs forget its instances means these too.
PatientS3FileSystem._cache = S3FileSystem._cache
