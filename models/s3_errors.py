"""What an error of S3 means: whether it passes by itself, or refuses everything, and its name."""

from __future__ import annotations

from typing import Any

from aiohttp import ClientError as HttpError
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

PASSING = (
    *(boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, HttpError, OSError),
    *(boto.ChecksumError, boto.FlexibleChecksumError, ResponseParserError),
    # A role's credentials, which are asked for again and again while a job runs.
    *(boto.CredentialRetrievalError, boto.MetadataRetrievalError),
)
PASSING_CODES = {
    *("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"),
    *("BandwidthLimitExceeded", "XAmzContentSHA256Mismatch", "IDPCommunicationError"),
}
"""Codes of errors that pass, beside those whose HTTP status is 429 or at least 500."""
NOT_IMPLEMENTED = 501
CREDENTIALS = frozenset(
    [
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException"),
        *("InvalidToken", "TokenRefreshRequired", "AuthFailure", "RequestExpired"),
        *("InvalidClientTokenId", "UnrecognizedClientException", "InvalidSecurity"),
    ]
)
"""Codes by which S3 refuses whoever asks."""
SKEWED = "RequestTimeTooSkewed"
REGIONS = frozenset(
    [
        *("AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "301", "307"),
        *("IllegalLocationConstraintException", "InvalidLocationConstraint"),
    ]
)
"""Codes by which S3 says that the bucket is elsewhere."""


def answer_of(error: BaseException) -> dict[str, Any]:
    """Returns what S3 answered; {} for an error without an answer."""
    origin = error.__cause__ if isinstance(error.__cause__, boto.ClientError) else error
    found: dict[str, Any] = origin.response if isinstance(origin, boto.ClientError) else {}
    return found


def code_of(error: BaseException) -> str:
    """Returns S3's code, such as NoSuchKey; the HTTP status where the answer had no body."""
    return str(answer_of(error).get("Error", {}).get("Code", ""))


def status_of(error: BaseException) -> int:
    """Returns the HTTP status; 0 without an answer."""
    return int(answer_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def passes(error: BaseException) -> bool:
    """Whether an error of S3 or of the network may be gone when the request is repeated."""
    if answer_of(error):
        status = status_of(error)
        passing = status == 429 or (status >= 500 and status != NOT_IMPLEMENTED)
        return passing or code_of(error) in PASSING_CODES
    if isinstance(error, boto.SSLError):
        return "EOF" in str(error)  # cut off in its handshake; wrong certificates stay wrong
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False
    return isinstance(error, PASSING)


def refuses_all(error: BaseException) -> bool:
    """Whether an error is about whoever asks, the clock or the bucket, and not about one object."""
    code = code_of(error)
    return code in CREDENTIALS | REGIONS or code in (SKEWED, "NoSuchBucket")


def named(error: Exception, uri: str) -> Exception:
    """Returns an error of S3 with its code and the object in its text.

    Only the text reaches the user when the error was raised in another process.
    """
    code = code_of(error)
    if not code or not isinstance(error, OSError):
        return error
    text = f"{error.strerror or error} ({code}: {uri})"
    new = type(error)(error.errno, text) if error.errno is not None else type(error)(text)
    new.__cause__ = error.__cause__
    return new
