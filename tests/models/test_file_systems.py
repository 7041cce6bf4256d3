"""The one place where URIs are opened: which protocols are read, and what others need."""

from __future__ import annotations

import ast
import importlib.util

import pytest
from pydantic import ValidationError

from helpers.repository import ROOT
from models.artifacts.artifact import load_artifact
from models.file_systems import PACKAGES, check_protocol, read_bytes, url_to_fs
from serve.embeddings.settings import ServeSettings
from serve.lm.settings import LMSettings
from serve.lm.store.session_store import SessionStore

MISSING = [name for name, package in PACKAGES.items() if not importlib.util.find_spec(package)]


@pytest.mark.parametrize("protocol", MISSING)
def test_a_storage_whose_package_is_missing_is_refused_with_what_to_install(protocol: str) -> None:
    uri, wanted = f"{protocol}://bucket/x", f"pip install {PACKAGES[protocol]}"
    opens = (url_to_fs, read_bytes, load_artifact, lambda uri: SessionStore(uri, "model"))
    for use in opens:
        with pytest.raises(ValueError, match=f"^{uri}: to read {protocol}://, {wanted}\n"):
            use(uri)
    for settings in (
        lambda: ServeSettings(artifact=uri),
        lambda: ServeSettings(artifact="here", align=uri),
        lambda: LMSettings(model="here", store=uri),
    ):
        with pytest.raises(ValidationError, match=wanted):
            settings()


def test_other_packages_of_fsspec_are_named_by_fsspec() -> None:
    with pytest.raises(ValueError, match=r"to read dropbox://, .*dropbox"):
        check_protocol("dropbox://x/y")


@pytest.mark.parametrize("uri", ["/a/b", "a::b", "memory://x", "s3://b/x", "file:///x", "s3a://b"])
def test_what_is_read_is_not_refused(uri: str) -> None:
    check_protocol(uri)


def test_nothing_else_opens_a_uri() -> None:
    """A path past `models.file_systems` has no patience and other refusals; ruff holds it too."""
    found = []
    for package in ("models", "pipelines", "serve"):
        for path in sorted((ROOT / package).rglob("*.py")):
            names = {
                alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import)
                for alias in node.names
            }
            if {"fsspec", "s3fs", "boto3"} & names:
                found.append(path.relative_to(ROOT).as_posix())
    assert found == ["models/file_systems.py"]
