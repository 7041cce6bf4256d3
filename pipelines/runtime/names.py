"""File and class names as other systems wrote them: their bytes may not be UTF-8.

Python represents such a byte by a lone surrogate (PEP 383). With it the file can be opened, but
Arrow, hashes and terminals refuse it. So names are kept as they are until they are stored or shown.
"""

from __future__ import annotations

import re
import unicodedata

_FOREIGN = re.compile("[\udc80-\udcff]")


def escaped(name: str) -> str:
    r"""Returns `name` as UTF-8 can hold it: a byte that is not UTF-8 becomes `\xNN`.

    Any other lone surrogate (JSON can hold one) becomes `\uNNNN`. Most names come back unchanged.
    """
    if name.isascii():
        return name
    text = _FOREIGN.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", name)
    return text.encode(errors="backslashreplace").decode()


def composed(name: str) -> str:
    """Returns a class name in NFC for comparison; macOS stores accents apart from their letters."""
    return unicodedata.normalize("NFC", name)
