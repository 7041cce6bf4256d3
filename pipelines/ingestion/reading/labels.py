"""Reads labels in the forms people store them; a label that is not understood costs no image."""

from __future__ import annotations

import codecs
import json
import math
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

LARGEST_LABEL = 2**20  # larger integers are names, not class indices
# Files with the label of the image they are named after; of two, the first kind counts.
LABEL_SUFFIXES = (".cls", ".json")
LABEL_KEYS = ("label", "cls", "class")  # in a `.json`

NOT_UNDERSTOOD = "label_not_understood"
NO_TEXT = "label_no_text"
BROKEN_JSON = "label_broken_json"
NO_FIT = "no_fitting_label"
UNDECLARED = "label_undeclared"

Label = int | str | None

# With the ".0" of pandas, where a value is missing.
_INTEGER = re.compile(r"-?[0-9]{1,18}(\.0*)?")
_SAVETXT = re.compile(r"[+-]?[0-9]\.[0-9]{4,}e[+-][0-9]{2,3}")  # as numpy.savetxt writes any number
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class LabelError(ValueError):
    """A label that cannot be used.

    Attributes:
        reason: one of the names above; short and stable, for counting.
        detail: what it is, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def as_label(value: Any) -> Label:
    """Returns a class index for small whole numbers (or their text), else text.

    Truth values are 0 and 1. None, NaN (and its text), empty text and negative numbers mean
    unlabelled. White space around text does not count.

    Raises:
        LabelError: neither a whole number nor text.
    """
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = text_of(value)
    if isinstance(value, str):
        value = _number_in(value.strip())
    if value is None or value == "" or isinstance(value, str):
        return value or None
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return None
        if not math.isfinite(value) or value != int(value):
            raise LabelError(NOT_UNDERSTOOD, f"{value} is no whole number")
        value = int(value)
    if not isinstance(value, int):
        raise LabelError(NOT_UNDERSTOOD, f"{_shown(value)} is neither a whole number nor text")
    if value >= LARGEST_LABEL:
        return str(value)
    return int(value) if value >= 0 else None


def _number_in(text: str) -> str | int | float:
    """Returns the number that `text` is, where programs write labels so; else the text."""
    if _INTEGER.fullmatch(text):
        return int(text.partition(".")[0])
    if _SAVETXT.fullmatch(text) and float(text).is_integer():
        return float(text)
    return math.nan if text.lower() == "nan" else text


def text_of(data: bytes) -> str:
    """Returns UTF-8, or UTF-16 with a byte-order mark, as text without white space around it.

    Raises:
        LabelError: it is neither.
    """
    encoding = "utf-16" if data.startswith(_UTF16) else "utf-8-sig"
    try:
        text = data.decode(encoding).strip()
    except UnicodeDecodeError as error:
        raise LabelError(NO_TEXT, f"neither UTF-8 nor marked as UTF-16: {error.reason}") from error
    if "\0" in text:
        raise LabelError(NO_TEXT, "holds zero bytes: UTF-16 without its mark, or no text")
    return text


def label_in_file(suffix: str, data: bytes) -> tuple[bool, Label]:
    """Reads a label file.

    Args:
        suffix: one of `LABEL_SUFFIXES`.
        data: what the file holds.

    Returns:
        Whether there is a label in it (a `.json` may be about something else), and the label.

    Raises:
        LabelError: it cannot be read, or its label is not understood.
    """
    if suffix == ".cls":
        return True, as_label(text_of(data))
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LabelError(BROKEN_JSON, str(error)) from error
    if not isinstance(values, dict):
        return True, as_label(values)
    found = [values[key] for key in LABEL_KEYS if key in values]
    given = [value for value in found if value is not None]
    return bool(found), as_label(given[0]) if given else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
