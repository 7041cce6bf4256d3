"""Reads base64 and data URIs (RFC 4648, RFC 2045, RFC 2397) and says what is wrong with them."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from urllib.parse import unquote

BLANK = " \t\r\n\f\v\ufeff"
"""Characters that may surround a text: white space and a byte-order mark."""

_BREAKS = re.compile(r"[\t\r\n\f\v]+")
_STRAY = re.compile(r"[^A-Za-z0-9+/=]")


def split_data_uri(text: str) -> tuple[str, str]:
    """Returns the media type and the base64 of a `data:` URI.

    Raises:
        ValueError: a part is missing; the message says which.
    """
    head, comma, data = text[len("data:") :].partition(",")
    media_type, *rest = (part.strip() for part in head.split(";"))
    if not comma:
        raise ValueError("there is no comma")
    if not rest or rest[-1].lower() != "base64":
        raise ValueError("`;base64` does not stand before the comma")
    return media_type, data


def decode(text: str, *, is_uri: bool) -> bytes:
    """Decodes base64. Line breaks are ignored, and percent escapes are decoded in a URI.

    Raises:
        ValueError: the message says what is wrong, as the end of a sentence.
    """
    with suppress(ValueError):  # the usual case, without a copy of the text
        return base64.b64decode(text, validate=True)
    if is_uri and "%" in text:
        text = unquote(text)
    text = _BREAKS.sub("", text.strip(BLANK))
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(_fault(text)) from error


def _fault(text: str) -> str:
    stray = _STRAY.search(text)
    if stray is not None:
        return _stray(text, stray)
    padding = text.find("=")
    if 0 <= padding < len(text.rstrip("=")):
        return f"goes on behind its padding `=` (character {padding + 1})"
    if len(text) % 4:
        return (
            f"has {len(text)} characters, not a multiple of 4: its padding `=` is missing, or it "
            "was cut off"
        )
    return "has too much padding `=`"


def _stray(text: str, stray: re.Match[str]) -> str:
    character, place = stray[0], stray.start() + 1
    if text[:2] in ("b'", 'b"'):
        return "begins with b' as Python prints bytes; decode them to text first"
    if character in "-_" and "+" not in text and "/" not in text:
        return "is of the URL-safe alphabet (`-`, `_`); send the standard one (`+`, `/`)"
    if character == "%":
        return f"holds percent escapes (character {place}); send the characters themselves"
    if character == " ":
        return f"holds a space (character {place}); `+` becomes one where a form is decoded"
    return f"holds {character!r} (character {place}), none of A-Z, a-z, 0-9, + and /"
