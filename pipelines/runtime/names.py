"""Names as other systems wrote them: bytes that need not be UTF-8.

Python carries such a byte through as a lone surrogate (PEP 383), with which the file can be opened;
Arrow, hashes and terminals refuse it. So names stay as they are until they are stored or shown.
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
    """Returns a class name as it is compared: a Mac's folders have accents apart from their letters."""
    return unicodedata.normalize("NFC", name)
