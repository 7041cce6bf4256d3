"""Byte-order marks and encodings of bodies, and how much of a body errors repeat."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from helpers.serve.ingress import NAMES, POSTS, ask, make
from helpers.waiting import LIMIT_S


@pytest.mark.parametrize("name", NAMES)
def test_byte_order_marks_and_encodings_of_bodies(name: str) -> None:
    made = make(name)

    def post(body: bytes, **headers: str) -> dict[str, Any]:
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        asked = ask(made.app, "POST", POSTS[name], headers=headers, pieces=[body])
        return asyncio.run(asyncio.wait_for(asked, LIMIT_S)).error

    wrong = {"type": "object", "k" * 9_000: 1, "temperature": "x"}
    text = json.dumps(wrong)
    told = [
        post(text.encode()),
        post(text.encode("utf-8-sig")),  # PowerShell's and .NET's byte-order mark
        post(text.encode(), content_encoding=""),
        post(text.encode(), content_encoding="Identity "),
    ]
    assert [error["code"] for error in told] == ["unknown_field"] * 4
    assert told == [told[0]] * 4
    assert post(b"\xef\xbb\xbf" * 2 + b"{}")["code"] == "invalid_json"
    utf16 = post(text.encode("utf-16"))
    assert utf16["message"] == "the body is not valid JSON: send UTF-8, not UTF-16"
    error = post(json.dumps({"k" * 9_000: 1}).encode())
    assert len(error["message"]) == len(error["param"]) == 2000  # not all of what was sent
    assert post(text.encode(), content_encoding="gzip")["code"] == "unsupported_content_encoding"
