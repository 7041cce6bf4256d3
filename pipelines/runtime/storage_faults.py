"""Messages for errors of disks and S3, which name the flag, the place and what to do."""

from __future__ import annotations

import errno
import os

from models.s3_errors import CREDENTIALS, REGIONS, SKEWED
from pipelines.config.places import Place
from pipelines.runtime.faults import Fault
from pipelines.runtime.places import MAKE, holding

_FULL = (errno.ENOSPC, errno.EDQUOT)
SET_KEYS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
FOREIGN = ("gcsfs", "google", "adlfs", "azure", "ossfs", "oss2", "huggingface_hub")
"""Packages whose errors other storages raise."""
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
SET_CLOCK = "Set it, as by NTP (`timedatectl`), on every machine of the cluster."
SET_REGION = "Set AWS_DEFAULT_REGION to the bucket's own, and AWS_ENDPOINT_URL for other than AWS."
RENEW = "Get new ones (aws sso login, a new session token); the same command then goes on."


def explain_storage(fault: Fault, found: list[Place]) -> str | None:
    """Returns the message for an error of a disk, of S3 or of the network; None for other errors.

    Args:
        fault: The error.
        found: The places of the configuration.
    """
    if fault.module in ("botocore", "aiobotocore", "aiohttp") or fault.code is not None:
        return _of_s3(fault, found)
    if fault.is_a("ValueError") and fault.text.startswith("Invalid endpoint"):
        where = _where(fault, found, remote=True)
        return (
            f"{where}{fault.first_line}\nSet AWS_ENDPOINT_URL to http://HOST:PORT or https://HOST."
        )
    if fault.module in FOREIGN:
        return f"{_where(fault, found, remote=True)}{fault.name}: {fault.first_line}"
    if not fault.is_a("OSError"):
        return None
    if fault.number is None or "--" in fault.text:
        return _in_s3_words(fault, found)
    return _of_disk(fault, found)


def _of_s3(fault: Fault, found: list[Place]) -> str:
    where = _where(fault, found, remote=True)
    if fault.is_a("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return f"{where}no credentials for S3 ({fault.first_line})\n{SET_KEYS}"
    if fault.is_a("EndpointConnectionError", "HTTPClientError", "ClientConnectorError"):
        at = fault.endpoint or os.environ.get("AWS_ENDPOINT_URL") or "S3"
        return f"{where}no answer from {at}\nIs AWS_ENDPOINT_URL right, and the network there?"
    if fault.is_a("ResponseParserError"):
        at = os.environ.get("AWS_ENDPOINT_URL") or "S3's address"
        return f"{where}what answers at {at} is no S3 ({fault.first_line})\nSet AWS_ENDPOINT_URL."
    if fault.code == "NoSuchBucket":
        return f"{where}there is no bucket {fault.bucket or ''}\n{MAKE}"
    if fault.code in CREDENTIALS:
        way_out = RENEW if fault.code in EXPIRED else SET_KEYS
        return f"{where}S3 refuses the credentials{_because(fault)}\n{way_out}"
    if fault.code == SKEWED:
        return f"{where}the clock of this machine is wrong, says S3{_because(fault)}\n{SET_CLOCK}"
    if fault.code in REGIONS:
        return f"{where}the bucket is in another region{_because(fault)}\n{SET_REGION}"
    if fault.is_a("PermissionError") or fault.code in ("AccessDenied", "403", "Forbidden"):
        return f"{where}access denied ({fault.first_line})\nThe credentials may not do this there."
    return f"{where}S3: {fault.first_line}"


def _because(fault: Fault) -> str:
    """Returns what S3 said, with its code."""
    text, code = fault.first_line, str(fault.code)
    return f" ({text})" if code in text else f" ({code}: {text})"


def _in_s3_words(fault: Fault, found: list[Place]) -> str:
    """An OSError without a number: ours, or one of S3 as a worker sent it, reduced to text."""
    if "bucket does not exist" in fault.text:
        where = _where(fault, found, remote=True)
        return f"{where}there is no such bucket\n{MAKE}"
    if fault.is_a("PermissionError") and "--" not in fault.text:
        where = _where(fault, found, remote=True)
        return f"{where}access denied ({fault.first_line})\nThe credentials may not do this there."
    place = None if "--" in fault.text else holding(found, fault.text)
    return f"{place.flag}: {fault.text}" if place else fault.text


def _of_disk(fault: Fault, found: list[Place]) -> str:
    where = _where(fault, found, written=fault.number in (*_FULL, errno.EROFS))
    if fault.number in _FULL:
        return f"{where}no space left on the disk{_at(fault)}\nFree some, or name another folder."
    if fault.number in (errno.EACCES, errno.EPERM):
        return f"{where}this user may not read or write there{_at(fault)}\nName another folder."
    if fault.number == errno.EROFS:
        return f"{where}a file system that cannot be written{_at(fault)}\nName another folder."
    if fault.number in (errno.ENOTDIR, errno.EEXIST):
        return f"{where}a file is where a folder must be{_at(fault)}\nName another."
    if fault.number == errno.EISDIR:
        return f"{where}a folder is where a file must be{_at(fault)}\nName another."
    if fault.number == errno.ENOENT:
        return f"{where}not there{_at(fault)}"
    return f"{where}{fault.first_line}"


def _at(fault: Fault) -> str:
    return f" ({fault.path})" if fault.path else ""


def _where(fault: Fault, found: list[Place], *, remote: bool = False, written: bool = False) -> str:
    """Returns flag and value of the place an error is about, or of all candidates."""
    if fault.about:
        return f"{fault.about}: "
    place = holding(found, fault.path or "") or holding(found, fault.text)
    if place is not None:
        return f"{place.flag}: {place.uri}: "
    may_be = [place for place in found if "://" in place.uri] if remote else []
    if fault.bucket:
        may_be = [place for place in may_be if fault.bucket in place.uri.split("/")]
    if written and not fault.path:
        may_be = [place for place in found if place.field.written]
    named = {place.flag: place.uri for place in may_be}  # the last of a flag's is absolute
    if len(named) == 1:
        return "".join(f"{flag}: {uri}: " for flag, uri in named.items())
    return f"{', '.join(named)}: " if named else ""
