"""Regions of the picture that a request or a stream leaves out."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from models.media.regions import Region, check_region
from serve.ingress.bodies import RequestModel

MAX_REGIONS = 64
"""Rectangles of one request at most."""

_Sides = Annotated[list[float], Field(min_length=4, max_length=4)]


class RegionOptions(RequestModel):
    """Field of `POST /v1/embeddings` and of a stream's start that says what is not encoded."""

    exclude: list[_Sides] | None = Field(None, max_length=MAX_REGIONS)
    """Rectangles whose patches are not encoded, each [left, top, right, bottom] as fractions of the
    picture's width and height. They replace those of the artifact; an empty list leaves nothing
    out."""

    @model_validator(mode="after")
    def _inside(self) -> Self:
        for number, sides in enumerate(self.exclude or ()):
            try:
                check_region(_region(sides))
            except ValueError as error:
                raise ValueError(f"exclude.{number}: {error}") from error
        return self

    @property
    def regions(self) -> tuple[Region, ...] | None:
        """The rectangles; None for those of the artifact."""
        return None if self.exclude is None else tuple(map(_region, self.exclude))


def _region(sides: list[float]) -> Region:
    left, top, right, bottom = sides
    return left, top, right, bottom
