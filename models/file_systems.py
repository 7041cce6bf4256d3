"""The file system of a URI. Everything that opens local or remote files gets it here."""

from __future__ import annotations

from typing import Any

import fsspec

S3 = ("s3", "s3a")


def url_to_fs(uri: str, *, patience_s: float | None = None) -> tuple[Any, str]:
    """Returns the fsspec file system of a URI and the path in it; remote listings are not cached.

    Args:
        uri: A local path or an address.
        patience_s: Seconds for which S3 is waited for when it does not answer; None means minutes
            (`models.patient_s3`), 0 that the first failure is raised.
    """
    if uri.partition("://")[0] not in S3 or "::" in uri:
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        return fs, path
    from models.patient_s3 import PatientS3FileSystem

    options = PatientS3FileSystem._get_kwargs_from_urls(uri)
    if patience_s is not None:
        options["patience_s"] = patience_s
    fs = PatientS3FileSystem(use_listings_cache=False, **options)
    return fs, fs._strip_protocol(uri)


def file_system(protocol: str) -> Any:
    """Returns the fsspec file system of a protocol; it does not cache remote listings."""
    return (
        url_to_fs("s3://")[0]
        if protocol in S3
        else fsspec.filesystem(protocol, use_listings_cache=False)
    )
