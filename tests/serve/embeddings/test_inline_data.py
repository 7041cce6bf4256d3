"""Images in a request as base64 or data URIs, and the errors for malformed ones."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest

from helpers.serve.embeddings import base64_of, data_uri, encoded, picture
from serve.embeddings.media.inputs import decode_base64, parse_input
from serve.ingress.errors import ApiError

PNG = encoded(picture(0))
TEXT = base64_of(PNG)
URI = data_uri(PNG)
FEED = "\r\n"
WRAPPED = base64.encodebytes(PNG).decode()
BARE = "not a data URI or http(s) URL, and as base64 it "


def decoded(text: str) -> bytes:
    (reference,) = parse_input(text, max_items=1)
    assert not reference.is_url
    return decode_base64(reference, max_bytes=len(PNG))


def refused(text: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decoded(text)
    assert (caught.value.status, caught.value.param) == (400, "input")
    return caught.value


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        URI,
        WRAPPED,
        WRAPPED.replace("\n", FEED),
        f"data:image/png;base64,{WRAPPED}",
        f"data:image/png;base64, {TEXT}",
        f"data:image/png; base64,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        f"data:image/png;base64,{quote(WRAPPED)}",
        f" {URI}",
        f"\n{URI}\n",
        f"\ufeff{URI}",
        f"\ufeff{TEXT}",
    ],
)
def test_harmless_deviations_from_base64_are_accepted(text: str) -> None:
    assert "+" in TEXT  # or nothing would be escaped
    assert decoded(text) == PNG


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (base64.urlsafe_b64encode(b"\xfb\xff\xfe" * 9).decode(), "is of the URL-safe alphabet"),
        (TEXT.rstrip("=") + "A" * (2 - len(TEXT.rstrip("=")) % 4), "not a multiple of 4"),
        (TEXT[:-5], "its padding `=` is missing, or it was cut off"),
        (TEXT.replace("+", " "), "holds a space (character "),
        (str(PNG[:9]), "begins with b' as Python prints bytes"),
        (str(TEXT.encode()), "begins with b' as Python prints bytes"),
        (f'"{TEXT}"', "holds '\"' (character 1)"),
        ("aGk=aGk=", "goes on behind its padding `=` (character 4)"),
        ("aGk=====", "has too much padding"),
        ("aG\u00e9k", "holds 'é' (character 3)"),
    ],
)
def test_errors_say_what_is_wrong_with_base64(data: str, told: str) -> None:
    inline, bare = refused(f"data:image/png;base64,{data}"), refused(data)
    assert inline.code == bare.code == "invalid_base64"
    assert inline.message.startswith("the base64 of the data URI ")
    assert bare.message.startswith(BARE)
    assert bare.message.endswith("; text is not embedded")
    assert told in inline.message
    assert told in bare.message


def test_percent_escapes_belong_to_uris() -> None:
    assert "percent escapes" in refused(TEXT.replace("+", "%2B")).message


def test_a_text_to_embed_is_refused_as_text() -> None:
    error = refused("a photo of a cat")
    assert error.code == "invalid_base64"
    assert "text is not embedded" in error.message


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        (f"data:image/png;base64{TEXT}", "invalid_data_uri", "there is no comma"),
        (f"data:image/png,{TEXT}", "invalid_data_uri", "`;base64` does not stand"),
        (f"data:base64,{TEXT}", "invalid_data_uri", "`;base64` does not stand"),
        (f"data:image/png;base64;x=y,{TEXT}", "invalid_data_uri", "`;base64` does not stand"),
        (f"data:image;base64,{TEXT}", "unsupported_media_type", "media type 'image'"),
        (f"data:text/plain;base64,{TEXT}", "unsupported_media_type", "media type 'text/plain'"),
        (f"data:{'x' * 9999};base64,{TEXT}", "unsupported_media_type", "xxx"),
    ],
)
def test_errors_say_what_is_wrong_with_a_data_uri(text: str, code: str, told: str) -> None:
    error = refused(text)
    assert error.code == code
    assert told in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize("text", ["", "data:image/png;base64,", " \n", "data:image/png;base64, \n"])
def test_empty_base64_is_empty(text: str) -> None:
    """The image decoder then refuses it as empty."""
    assert decoded(text) == b""


def test_the_limit_counts_decoded_bytes() -> None:
    assert len(WRAPPED) > len(TEXT)
    assert decoded(WRAPPED) == PNG  # exactly the limit
    (reference,) = parse_input(WRAPPED, max_items=1)
    with pytest.raises(ApiError) as caught:
        decode_base64(reference, max_bytes=len(PNG) - 1)
    assert (caught.value.status, caught.value.code) == (413, "image_too_large")
