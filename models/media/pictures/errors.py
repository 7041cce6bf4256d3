"""The error for a picture that cannot be used."""

from __future__ import annotations


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: a short and stable code, for counting: `empty`, `not_an_image`, `truncated`,
            `too_many_pixels`, `unknown_range` or `decode_error`.
        detail: a message for people, such as the decoder's.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        """Lets the error be pickled with both fields."""
        return type(self), (self.reason, self.detail)
