"""Views of a sample, for objectives that compare several (LeJEPA, VICReg)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from models.image_size import ImageSize, as_image_size
from pipelines.config.checks import require, require_range
from pipelines.config.input_flags import size_flag


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Views, made on the device from one decoded picture or clip (`models/views.py`).

    The picture is the loader's crop, of `model.image_size`: `--data.crop-scale 1 1` leaves all
    cropping to the views.
    """

    globals: int = 2
    """Number of views of the encoder's own size."""
    locals: int = 0
    """Number of views of smaller parts of the picture."""
    local_size: Annotated[ImageSize | None, size_flag("views.local-size", optional=True)] = None
    """Pixels of a local view: on a side of a square, or HEIGHTxWIDTH; multiples of the patch size.
    None makes local views as large as global ones."""
    global_scale: tuple[float, float] = (0.3, 1.0)
    """Area range of a global view, as a fraction of the picture; 1 1 does not crop."""
    local_scale: tuple[float, float] = (0.05, 0.3)
    """Area range of a local view."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crops' aspect ratio, width by height, relative to the picture's."""
    flip: float = 0.5
    """Probability that a view is flipped left-right."""
    colour: float = 0.8
    """Probability that brightness, contrast, saturation and hue of a view are changed."""
    brightness: float = 0.4
    """Largest relative change of the brightness."""
    contrast: float = 0.4
    """Largest relative change of the contrast."""
    saturation: float = 0.2
    """Largest relative change of the saturation."""
    hue: float = 0.1
    """Largest turn of the hue, as a fraction of the colour circle."""
    grey: float = 0.2
    """Probability that a view becomes greyscale."""
    blur: float = 0.0
    """Probability that a view is blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarise: float = 0.0
    """Probability that a view is solarised: values in the upper half are inverted."""
    token_drop: float = 0.0
    """Fraction of a view's tokens, drawn at random, that the encoder skips (LeVJEPA: 0.95)."""
    time_window: float = 1.0
    """Fraction of a clip's duration that a view covers, starting at random. Below 1, views of a
    clip share what lasts, such as what moves and in which direction, but not where it is."""

    def __post_init__(self) -> None:
        if self.local_size is not None:
            object.__setattr__(self, "local_size", as_image_size(self.local_size))
        require(self.globals >= 1, "views.globals", "must be at least 1")
        require(self.locals >= 0, "views.locals", "must be >= 0")
        require(self.globals + self.locals >= 2, "views.globals", "there must be two views or more")
        require_range(self.global_scale, "views.global-scale", 0.0, 1.0)
        require_range(self.local_scale, "views.local-scale", 0.0, 1.0)
        require_range(self.ratio, "views.ratio", 0.0, 10.0)
        require_range(self.blur_sigma, "views.blur-sigma", 0.0, 1000.0)
        shares = ("flip", "colour", "grey", "blur", "solarise", "brightness", "contrast")
        for name in (*shares, "saturation"):
            require(0 <= getattr(self, name) <= 1, f"views.{name}", "must lie in [0, 1]")
        require(0 <= self.hue <= 0.5, "views.hue", "must lie in [0, 0.5]")
        require(0 <= self.token_drop < 1, "views.token-drop", "must lie in [0, 1)")
        require(0 < self.time_window <= 1, "views.time-window", "must lie in (0, 1]")
