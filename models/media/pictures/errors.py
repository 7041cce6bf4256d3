"""What is wrong with a picture that cannot be used."""

from __future__ import annotations


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: one of `empty`, `not_an_image`, `truncated`, `too_many_pixels`, `unknown_range`,
            `decode_error`; short and stable, for counting.
        detail: what the decoder said, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        """Crosses process borders with both fields."""
        return type(self), (self.reason, self.detail)
