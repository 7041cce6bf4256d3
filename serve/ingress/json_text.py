"""Writes JSON that every parser reads."""

from __future__ import annotations

import json
from typing import Any

import pydantic_core

NO_JSON = (b"NaN", b"Infinity")


def to_json(value: Any) -> bytes:
    """Returns the JSON text of a value.

    Raises:
        ValueError: the value holds a NaN or an infinity, which JSON does not have.
    """
    text = pydantic_core.to_json(value)
    if any(word in text for word in NO_JSON):  # unless the word is part of a string
        json.dumps(
            pydantic_core.to_jsonable_python(value, inf_nan_mode="constants"), allow_nan=False
        )
    return text
