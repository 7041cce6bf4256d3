"""Parses lists of files: CSV and similar tables, JSON lines, or two words a line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.ingestion.listing.media import suffix_of, suffixes

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".jsonl", ".ndjson", ".json")
# Headers, as `_plain` leaves them; the first of these that is there counts.
PATH_HEADERS = (
    *("path", "filename", "file", "filepath", "image", "imagepath", "imagefile", "imagefilename"),
    *("imagename", "img", "imgpath", "imgname", "imgfile", "video", "videopath", "videofile"),
    *("videoname", "relativepath", "relpath", "uri", "url", "fname"),
)
LABEL_HEADERS = (
    *("label", "labels", "class", "classname", "classlabel", "category", "categoryname", "target"),
    *("cls", "labelname", "targetlabel", "classid", "classindex", "labelid", "categoryid"),
)
_SEPARATORS = (",", "\t", ";", "|")
_SAMPLE_ROWS = 100
_LONGEST_CELL = 2**30  # run-length masks and captions lie beside the names
_NESTED = "\0"  # stands for a JSON value that is neither text nor a number
_MARKS = (
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
    (codecs.BOM_UTF8, "utf-8-sig"),
)

Row = tuple[str, str | None]  # path and label


@dataclass(frozen=True)
class FileList:
    """The content of a list of files.

    Attributes:
        rows: path, as it stands there, and label of each file.
        labelled: whether the list has a column of labels.
        notes: what its user should know of how it was read.
    """

    rows: tuple[Row, ...]
    labelled: bool
    notes: tuple[str, ...]


def read_file_list(
    data: bytes, name: str, *, path_column: str = "", label_column: str = ""
) -> FileList:
    """Reads a list of files.

    Columns are known by the names in the first row, if it has names; else the one with names of
    images or videos is the path, and of the others the first that does not number the rows the
    label.

    Args:
        data: the file's bytes: UTF-8, UTF-16 or UTF-32 by its mark, or another encoding of 8 bits.
        name: its name, for messages; the suffix helps to tell its form.
        path_column: the column of paths, where the user named it.
        label_column: likewise of labels.

    Raises:
        ValueError: it cannot be read, names no file, or lacks a named column.
    """
    text, foreign = decoded(data, name)
    notes = []
    if foreign:
        notes.append(
            f"{name} is not UTF-8: its names are taken byte by byte, or else as Windows-1252, "
            "its labels as Windows-1252 (save it as UTF-8 if they come out wrong)"
        )
    try:
        is_json = _is_json(text)
        table = _json_table(text, name) if is_json else _csv_table(text, suffix_of(name))
    except csv.Error as error:
        raise ValueError(f"--source: the list {name} cannot be read: {error}") from error
    rows = [row for row in table if any(cell for cell in row)]
    rows, remarks = _without_remarks(rows)
    if remarks:
        notes.append(f"{remarks} lines of {name} that begin with # are taken as remarks")
    header = rows[0] if is_json and rows else _header(rows, (path_column, label_column))
    rows = rows[1:] if header else rows
    if not rows:
        raise ValueError(f"--source: the list {name} names no file")
    path = _column(header, path_column, "image-column", name)
    label = _column(header, label_column, "label-column", name)
    path = _path_column(header, rows) if path is None else path
    label = _label_column(header, rows, path) if label is None else label
    unread = [cell for at, cell in enumerate(header) if at not in (path, label) and cell.strip()]
    if unread:
        hint = "" if label is not None else "; --label-column names the one with labels"
        notes.append(f"columns of {name} that are not read: {', '.join(unread)}{hint}")
    nested = sum(_cell(row, label) == _NESTED for row in rows)
    if nested:
        notes.append(f"{nested} labels of {name} are neither text nor numbers: left out")
    found = tuple((_cell(row, path), _label(_cell(row, label))) for row in rows)
    return FileList(found, label is not None, tuple(notes))


def decoded(data: bytes, name: str, *, flag: str = "source") -> tuple[str, bool]:
    """Returns a file's text, and whether bytes in it that are not UTF-8 stand as lone surrogates.

    Raises:
        ValueError: it is marked as UTF-16 or UTF-32 and is not; headed by `flag`.
    """
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "")
    if not encoding and b"\0" in data[:200]:  # what editors on Windows write, without its mark
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        return data.decode(encoding or "utf-8"), False
    except UnicodeDecodeError as error:
        if encoding:
            message = f"{name} is no {encoding.upper()} ({error.reason}): save it as UTF-8"
            raise ValueError(f"--{flag}: {message}") from error
    return data.decode(errors="surrogateescape"), True


def readable(text: str) -> str:
    """Returns text whose bytes were not UTF-8 as the commonest encoding of 8 bits has it."""
    raw = text.encode(errors="surrogateescape")
    try:
        return raw.decode("cp1252")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _is_foreign(text: str) -> bool:
    return any("\udc80" <= letter <= "\udcff" for letter in text)


def _label(cell: str) -> str | None:
    if cell == _NESTED:
        return None
    return (readable(cell) if _is_foreign(cell) else cell) or None


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column] if column is not None and column < len(row) else ""


# -------------------------------------------------------------------------------- rows and cells


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] == "{" or bool(re.match(r"\s*\[\s*[{\[\]]", text))


def _json_table(text: str, name: str) -> list[list[str]]:
    """Returns JSON objects, one a line or in a list, as rows below a header of all their keys."""
    objects = _json_objects(text, name)
    keys = list(dict.fromkeys(key for values in objects for key in values))
    return [keys, *([_json_cell(values.get(key)) for key in keys] for values in objects)]


def _json_objects(text: str, name: str) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, list) and all(isinstance(value, dict) for value in whole):
        return whole
    if isinstance(whole, dict) and "\n" in text.strip():
        message = f"{name} is one JSON object; give a list of objects with a path each"
        raise ValueError(f"--source: {message}, or one such object a line")
    objects = []
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--source: line {number} of {name} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"--source: line {number} of {name} is no JSON object")
        objects.append(values)
    return objects


def _json_cell(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | dict):
        return _NESTED
    return "" if value is None or value != value else str(value)


def _csv_table(text: str, suffix: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    signed = [line for line in lines if line.lstrip().startswith("#")]
    remarks = {line for line in signed if _is_remark(re.split(r"[,;|\t]", line))}
    lines = [line for line in lines if line not in remarks]
    separator = _separator(lines[:_SAMPLE_ROWS], suffix)
    if separator is None:
        header = lines[:1] if lines and _names_columns(lines[0].split()) else []
        words = [_two_words(line) for line in lines[len(header) :]]
        if words and all(words):
            pairs = [list(pair) for pair in words if pair]
            return [
                *([line] for line in signed if line in remarks),
                *(line.split() for line in header),
                *pairs,
            ]
    return _split(io.StringIO(text, newline=""), separator or ",")


def _without_remarks(rows: list[list[str]]) -> tuple[list[list[str]], int]:
    """Returns rows without remarks, and how many these were."""
    kept = [row for row in rows if not _is_remark(row)]
    return kept, len(rows) - len(kept)


def _is_remark(row: Sequence[str]) -> bool:
    """True for what begins with `#` and holds neither headers nor names of media."""
    if not row[0].lstrip().startswith("#") or any(map(_is_media, row)) or _names_columns(row):
        return False
    words = row[0].replace("#", " ").split()
    return not all(_plain(word) in (*PATH_HEADERS, *LABEL_HEADERS) for word in words)


def _split(lines: Iterable[str], separator: str) -> list[list[str]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator != "\t")
    return [[cell.strip() for cell in row] for row in reader]


def _separator(sample: list[str], suffix: str) -> str | None:
    """Returns what separates the cells of most rows, best with a known header or a media name."""
    order = ("\t", *_SEPARATORS) if suffix in (".tsv", ".lst") else _SEPARATORS

    def score(separator: str) -> tuple[bool, int, int]:
        rows = _split(sample, separator)
        split = [row for row in rows if len(row) > 1]
        if len(split) * 2 <= len(rows) and separator != ",":  # a sign in a name
            return False, 0, 0
        header = bool(split) and rows[0] == split[0] and _names_columns(rows[0])
        return header, sum(any(map(_is_media, row)) for row in split), len(split)

    best = max(order, key=score)  # of equals the first
    return best if score(best)[2] else None


def _two_words(line: str) -> tuple[str, str] | None:
    """Splits `PATH LABEL`, as lists of Caffe and UCF101 have it; a path may hold spaces."""
    match = re.fullmatch(r"\s*(\S.*\.\w+)\s+(\S.*?)\s*", line)
    return (match[1], match[2]) if match and _is_media(match[1]) else None


def _is_media(cell: str) -> bool:
    suffix = suffix_of(cell.replace("\\", "/"))
    return suffix in suffixes("image") or suffix in suffixes("video")


# -------------------------------------------------------------------------------- columns


def _plain(header: str) -> str:
    return re.sub(r"[\s_:#-]", "", header).lower()


def _names_columns(row: Sequence[str]) -> bool:
    return any(_plain(cell) in PATH_HEADERS for cell in row) and not any(map(_is_media, row))


def _header(rows: list[list[str]], named: Iterable[str]) -> list[str]:
    """Returns the first row if it names the columns, else an empty one."""
    if not rows:
        return []
    first, rest = rows[0], rows[1 : 1 + _SAMPLE_ROWS]
    if _names_columns(first) or any(name and name in first for name in named):
        return first
    # Names that nobody knows, above a column of nothing but media.
    media = [at for at in range(len(first)) if rest and all(_is_media(_cell(r, at)) for r in rest)]
    return first if media and not any(map(_is_media, first)) else []


def _column(header: list[str], named: str, flag: str, name: str) -> int | None:
    if not named:
        return None
    if named not in header:
        shown = ", ".join(header) or "no names in its first row"
        raise ValueError(f"--{flag}: {name} has no column {named!r} (it has {shown})")
    return header.index(named)


def _known(header: list[str], names: Sequence[str]) -> int | None:
    plain = [_plain(cell) for cell in header]
    return next((plain.index(name) for name in names if name in plain), None)


def _path_column(header: list[str], rows: list[list[str]]) -> int:
    known = _known(header, PATH_HEADERS)
    if known is not None:
        return known
    sample = rows[:_SAMPLE_ROWS]
    columns = range(max(map(len, sample)))
    media = [sum(_is_media(_cell(row, at)) for row in sample) for at in columns]
    if max(media):
        return media.index(max(media))
    return next((at for at in columns if not _numbers_rows(sample, at)), 0)


def _label_column(header: list[str], rows: list[list[str]], path: int) -> int | None:
    known = _known(header, LABEL_HEADERS)
    if known is not None:
        return known
    sample = rows[:_SAMPLE_ROWS]  # columns with names that nobody knows are none
    others = [at for at in range(len(header), max(map(len, sample))) if at != path]
    named = [at for at in others if not _numbers_rows(sample, at)]
    # A column that numbers the rows may still be the labels, where there is no other.
    return next(iter(named or others), None)


def _numbers_rows(rows: list[list[str]], column: int) -> bool:
    cells = [_cell(row, column) for row in rows]
    return any(cells == [str(at + first) for at in range(len(rows))] for first in (0, 1))
