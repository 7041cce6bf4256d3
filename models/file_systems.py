"""The file system of a URI. Everything that opens local or remote files gets it here."""

from __future__ import annotations

from typing import Any

import fsspec

S3 = ("s3", "s3a")
PACKAGES = {
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("oss",), "ossfs"),
    **dict.fromkeys(("hf",), "huggingface_hub"),
}
"""PyPI packages that bring fsspec a file system, by protocol, where the two names differ."""
READABLE = "Places are local paths, file:// or s3:// (S3 and what speaks its protocol)."


def check_protocol(uri: str, about: str = "") -> None:
    """Refuses a URI whose protocol no installed file system understands.

    Args:
        uri: A local path or an address.
        about: What the message begins with, as in `--data.train: `.

    Raises:
        ValueError: Says which package is missing, or which protocols there are.
    """
    protocol, separator, _ = uri.partition("://")
    if not separator or "::" in uri:
        return
    package, lower = PACKAGES.get(protocol), protocol.lower()
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        told = f"nothing here reads {protocol}://"
        if package or isinstance(error, ImportError):
            told = f"to read {protocol}://, {f'pip install {package}' if package else error}"
        elif lower != protocol and lower in fsspec.available_protocols():
            told += f"; write {lower}://"
        raise ValueError(f"{about}{uri}: {told}\n{READABLE}") from error


def url_to_fs(uri: str, *, patience_s: float | None = None) -> tuple[Any, str]:
    """Returns the fsspec file system of a URI and the path in it; remote listings are not cached.

    Args:
        uri: A local path or an address.
        patience_s: Seconds for which S3 is waited for when it does not answer; None means minutes
            (`models.patient_s3`), 0 that the first failure is raised.

    Raises:
        ValueError: No installed file system understands the protocol.
    """
    if uri.partition("://")[0] not in S3 or "::" in uri:
        check_protocol(uri)
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


def read_bytes(uri: str) -> bytes:
    """Returns the contents of one file.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read.
    """
    fs, path = url_to_fs(uri)
    data: bytes = fs.cat_file(path)
    return data
