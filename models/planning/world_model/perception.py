"""What a world model sees of one frame: encoders of single frames, with one interface.

A perception maps normalised frames to latents and has a `backbone`, which is what is evaluated and
exported. `Keypoints` says where things are and so carries a prior that suits worlds of moving
points. `Convolutions` is a small network for views in which everything moves. `FrameViT` is the
encoder of every other objective. The last two can give a latent for every patch instead of one for
the whole frame.

Shape legend: B frames, C = 3 channels, H and W pixels, K maps, N tokens, D latent width, R and S
rows and columns of the last map, F channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.encoders.from_settings import Settings, encoder_from_settings
from models.encoders.vit import VisionTransformer
from models.image_size import Grid, height_width

CHANNELS = (32, 32)
"""Channels of the hidden layers of `Keypoints`."""
STRIDED = (16, 32, 64)
"""Channels of the layers of `Convolutions`, each of which halves height and width."""


class Perception(nn.Module):
    """Maps frames to latents."""

    width: int
    """D."""
    grid: Grid = Grid(1, 1, 1)
    """Rows and columns of the patches that have a latent each; one for the whole frame."""
    backbone: nn.Module
    """The network that is evaluated and exported."""

    def forward(self, frames_BCHW: Tensor) -> Tensor:
        """Encodes normalised frames: float [B, C, H, W] to [B, N * D], patch by patch."""
        raise NotImplementedError


class Keypoints(Perception):
    """Convolutions, and the mean place of each map's softmax (Finn et al. 2016, *Deep spatial
    autoencoders*, arXiv 1509.06113, section IV-B), mixed by a linear layer.

    Args:
        width: D, twice the number of maps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(
                f"--objective.latent-width: keypoints need an even number, got {width}"
            )
        self.width = width
        first, second = CHANNELS
        self.maps = nn.Sequential(
            nn.Conv2d(3, first, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(first, second, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(second, width // 2, kernel_size=3, padding=1),
        )
        self.mixed = nn.Linear(width, width)

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """All of it."""
        return self

    def forward(self, frames_BCHW: Tensor) -> Tensor:
        """See `Perception.forward`."""
        maps_BKHW = self.maps(frames_BCHW)
        share_BKN = maps_BKHW.flatten(2).softmax(-1)
        height, width = maps_BKHW.shape[-2:]
        y_H, x_W = (torch.linspace(-1, 1, n, device=share_BKN.device) for n in (height, width))
        places_N2 = torch.stack([x_W.repeat(height), y_H.repeat_interleave(width)], dim=-1)
        mixed: Tensor = self.mixed((share_BKN @ places_N2).flatten(1))
        return mixed


class Convolutions(Perception):
    """Convolutions that halve the frame three times, and a linear layer of the map or its patches.

    Args:
        size: H and W, multiples of 8.
        width: D.
        patches: gives a latent for every patch of 8 x 8 pixels.
    """

    def __init__(self, size: tuple[int, int], width: int, *, patches: bool) -> None:
        super().__init__()
        scale = 2 ** len(STRIDED)
        if any(side % scale for side in size):
            raise ValueError(
                f"--model.image-size: convolutions need multiples of {scale}, got {size}"
            )
        rows, columns = (side // scale for side in size)
        self.width = width
        self.grid = Grid(rows, columns, 1) if patches else Grid(1, 1, 1)
        layers: list[nn.Module] = []
        for before, after in zip((3, *STRIDED), STRIDED, strict=False):
            layers += [nn.Conv2d(before, after, kernel_size=5, stride=2, padding=2), nn.SiLU()]
        self.maps = nn.Sequential(*layers)
        features = STRIDED[-1] * (1 if patches else rows * columns)
        self.mixed = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """All of it."""
        return self

    def forward(self, frames_BCHW: Tensor) -> Tensor:
        """See `Perception.forward`."""
        maps_BFRS = self.maps(frames_BCHW)
        if self.grid.tokens == 1:
            whole: Tensor = self.mixed(maps_BFRS.flatten(1))
            return whole
        patches: Tensor = self.mixed(maps_BFRS.flatten(2).mT).flatten(1)
        return patches


class FrameViT(Perception):
    """The mean token of the run's encoder or all of its tokens, and a linear layer.

    Args:
        encoder: an encoder of images.
        width: D.
        patches: gives a latent for every token.
    """

    def __init__(self, encoder: VisionTransformer, width: int, *, patches: bool = False) -> None:
        super().__init__()
        self.width, self.backbone = width, encoder
        self.grid = encoder.grid if patches else Grid(1, 1, 1)
        self.mixed = nn.Linear(encoder.width, width)

    def forward(self, frames_BCHW: Tensor) -> Tensor:
        """See `Perception.forward`."""
        tokens_BND = self.backbone(frames_BCHW)
        if self.grid.tokens == 1:
            tokens_BND = tokens_BND.mean(1, keepdim=True)
        mixed: Tensor = self.mixed(tokens_BND).flatten(1)
        return mixed


def perception_from_settings(model: Settings, objective: Settings) -> Perception:
    """Builds the perception that `objective["perception"]` names, with fresh weights.

    Raises:
        ValueError: the settings are incompatible.
    """
    name, width = objective["perception"], objective["latent_width"]
    patches = objective["predictor"] == "block_causal"
    if name == "keypoints":
        return Keypoints(width)
    if name == "conv":
        return Convolutions(height_width(model["image_size"]), width, patches=patches)
    encoder = encoder_from_settings({**model, "frames": 1, "tubelet": 1})
    return FrameViT(encoder, width, patches=patches)
