"""Labels as people store them."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from pipelines.ingestion.reading.labels import LabelError, as_label, label_in_file


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((None, None), ("", None), (-1, None), ("-1", None)),
        *((0, 0), ("7", 7), ("07", 7), (2**20 - 1, 2**20 - 1)),
        *(("cat", "cat"), (2**20, "1048576"), ("1e3", "1e3"), ("--1", "--1")),
        *((" 7 ", 7), ("cat ", "cat"), ("\n", None), (pa.scalar("dog\n"), "dog")),
        *(("nan", None), ("NaN", None), ("naan", "naan"), ("None", "None")),
        # as numpy.savetxt writes them
        *(("1.000000000000000000e+00", 1), ("1.5000e+00", "1.5000e+00"), ("1.2e+01", "1.2e+01")),
        # pandas makes floating point of integers where one is missing
        *(
            (1.0, 1),
            (-1.0, None),
            (math.nan, None),
            ("3.0", 3),
            ("1.5", "1.5"),
            (float(2**20), "1048576"),
        ),
        *((True, 1), (False, 0), (Decimal("4.00"), 4), (Decimal("NaN"), None)),
        *((np.int64(3), 3), (np.float32(2), 2), (np.bool_(True), 1), (np.str_("cat"), "cat")),
        *((pa.scalar(5), 5), (pa.scalar("dog"), "dog"), (pa.scalar(None, pa.int8()), None)),
        *((b"cat", "cat"), (b"\xef\xbb\xbf7\r\n", 7), ("9" * 30, "9" * 30)),
    ],
)
def test_as_label(value: object, label: object) -> None:
    found = as_label(value)
    assert found == label
    assert type(found) is type(label)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *((1.5, "label_not_understood"), (math.inf, "label_not_understood")),
        *(([1], "label_not_understood"), ({"a": 1}, "label_not_understood")),
        *(
            (dt.date(2026, 1, 1), "label_not_understood"),
            (Decimal("0.5"), "label_not_understood"),
        ),
        *((b"\xff\x00", "label_no_text"), (pa.scalar([1, 2]), "label_not_understood")),
    ],
)
def test_what_is_no_label_says_so(value: object, reason: str) -> None:
    with pytest.raises(LabelError) as caught:
        as_label(value)
    assert caught.value.reason == reason


BOM = "\ufeff"
DEEP = b"[" * 100_000
LONG = b'{"label": ' + b"9" * 5000 + b"}"


@pytest.mark.parametrize(
    ("suffix", "data", "found"),
    [
        *(
            (".cls", b"7\n", (True, 7)),
            (".cls", b" cat ", (True, "cat")),
            (".cls", b"", (True, None)),
        ),
        *(
            (".cls", (BOM + "3").encode(), (True, 3)),
            (".cls", (BOM + "3").encode("utf-16-le"), (True, 3)),
        ),
        *((".cls", "caf\u00e9".encode("utf-16"), (True, "caf\u00e9")), (".cls", b"2.0", (True, 2))),
        *((".json", b'{"label": 1.0}', (True, 1)), (".json", b'{"class": true}', (True, 1))),
        *((".json", b'{"label": null, "cls": "cat"}', (True, "cat")), (".json", b"4", (True, 4))),
        *((".json", b'{"label": NaN}', (True, None)), (".json", b'{"label": null}', (True, None))),
        *(
            (".json", b'{"caption": "x"}', (False, None)),
            (".json", '{"cls": 2}'.encode("utf-16"), (True, 2)),
        ),
        (".json", (BOM + '{"cls": "dog"}').encode(), (True, "dog")),
    ],
)
def test_label_files(suffix: str, data: bytes, found: tuple[bool, object]) -> None:
    assert label_in_file(suffix, data) == found


@pytest.mark.parametrize(
    ("suffix", "data", "reason"),
    [
        *(
            (".cls", b"caf\xe9", "label_no_text"),
            (".cls", "7".encode("utf-16-le"), "label_no_text"),
        ),
        *((".cls", b"\xff\xfe7", "label_no_text"), (".json", b"{", "label_broken_json")),
        *((".json", b"", "label_broken_json"), (".json", DEEP, "label_broken_json")),
        *((".json", b"\xe9", "label_broken_json"), (".json", b"[1]", "label_not_understood")),
        *(
            (".json", b'{"cls": 1.5}', "label_not_understood"),
            (".json", b'{"label": [1]}', "label_not_understood"),
        ),
        (".json", LONG, "label_broken_json"),
    ],
    ids=lambda value: None if len(value) < 99 else f"{len(value)} bytes",
)
def test_label_files_that_hold_none(suffix: str, data: bytes, reason: str) -> None:
    with pytest.raises(LabelError) as caught:
        label_in_file(suffix, data)
    assert caught.value.reason == reason
