"""Views of a sample, for objectives that compare several (LeJEPA, VICReg)."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config.checks import require, require_range


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Views, made on the device from one decoded picture or clip (`models/views.py`).

    The picture is the loader's crop, `model.image_size` pixels on a side: `--data.crop-scale 1 1`
    leaves all cropping to the views.
    """

    globals: int = 2
    """Views of the encoder's own size."""
    locals: int = 0
    """Smaller views of smaller parts."""
    local_size: int | None = None
    """Pixels on a side of a local view, a multiple of the patch; None makes them as large as global
    ones."""
    global_scale: tuple[float, float] = (0.3, 1.0)
    """Area range of a global view, as a fraction of the picture; 1 1 does not crop."""
    local_scale: tuple[float, float] = (0.05, 0.3)
    """Area range of a local view."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect-ratio range of the crops."""
    flip: float = 0.5
    """Share of the views that are flipped left-right."""
    colour: float = 0.8
    """Share whose brightness, contrast, saturation and hue are changed."""
    brightness: float = 0.4
    """Largest change of the brightness, as a fraction of it."""
    contrast: float = 0.4
    """Largest change of the contrast."""
    saturation: float = 0.2
    """Largest change of the saturation."""
    hue: float = 0.1
    """Largest turn of the hue, as a fraction of the colour circle."""
    grey: float = 0.2
    """Share that loses its colour."""
    blur: float = 0.0
    """Share that is blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarise: float = 0.0
    """Share whose bright half of values is inverted."""
    token_drop: float = 0.0
    """Share of a view's tokens that the encoder does not compute, drawn at random (LeVJEPA: 0.95)."""
    time_window: float = 1.0
    """Share of a clip's time that a view sees, a stretch drawn at random for every view. Below 1, views
    of one clip agree on what lasts, such as who moves and which way, not on where it is."""

    def __post_init__(self) -> None:
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
