"""Parses a command line so that values which our own checks refuse are told as other errors are.

tyro catches what a configuration's check raises, draws a box around it and ends the process. Here
such an error reaches the caller instead. What tyro itself finds wrong with the usage (unknown
flags, which it knows better names for, or text where a number should be) stays its own to tell.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from typing import TextIO, TypeVar

C = TypeVar("C")


def parsed(parse: Callable[[], C]) -> C:
    """Runs a parser.

    Raises:
        ValueError: A check of ours refused a value; the message names its flag.
        SystemExit: The usage is wrong, or help was asked for; the parser has told it.
    """
    held, stderr = _Held(sys.stderr), sys.stderr
    refused: ValueError | None = None
    try:
        with contextlib.redirect_stderr(held):
            return parse()
    except SystemExit as ended:
        refused = _refused(ended)
        if refused is None:
            raise
    finally:
        if refused is None:
            stderr.write(held.getvalue())
    raise refused


def _refused(ended: SystemExit) -> ValueError | None:
    """Returns the error of a check of ours while which the parser ended the process."""
    error: BaseException | None = ended
    while error is not None:
        if isinstance(error, ValueError) and str(error).startswith("--"):
            return error
        error = error.__context__
    return None


class _Held(io.StringIO):
    """Text that is kept back from a stream; colours and widths stay as they are for that stream."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()
