"""What a world model sees of one frame: two encoders of single frames, with one interface.

A perception maps normalised frames to latents and has a `backbone`, which is what is evaluated and
exported. `Keypoints` says where things are and so carries a prior that suits worlds of moving
points. `FrameViT` is the encoder of every other objective and has no such prior.

Shape legend: B frames, C = 3 channels, H and W pixels, K maps, N tokens, D latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.encoders.from_settings import Settings, encoder_from_settings
from models.encoders.vit import VisionTransformer

CHANNELS = (32, 32)
"""Channels of the hidden layers of `Keypoints`."""


class Perception(nn.Module):
    """Maps frames to latents."""

    width: int
    """D."""
    backbone: nn.Module
    """The network that is evaluated and exported."""

    def forward(self, frames_BCHW: Tensor) -> Tensor:
        """Encodes normalised frames: float [B, C, H, W] to [B, D]."""
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


class FrameViT(Perception):
    """The mean token of the run's encoder, and a linear layer.

    Args:
        encoder: an encoder of images.
        width: D.
    """

    def __init__(self, encoder: VisionTransformer, width: int) -> None:
        super().__init__()
        self.width, self.backbone = width, encoder
        self.mixed = nn.Linear(encoder.width, width)

    def forward(self, frames_BCHW: Tensor) -> Tensor:
        """See `Perception.forward`."""
        mixed: Tensor = self.mixed(self.backbone(frames_BCHW).mean(1))
        return mixed


def perception_from_settings(model: Settings, objective: Settings) -> Perception:
    """Builds the perception that `objective["perception"]` names, with fresh weights.

    Raises:
        ValueError: the settings are incompatible.
    """
    if objective["perception"] == "keypoints":
        return Keypoints(objective["latent_width"])
    encoder = encoder_from_settings({**model, "frames": 1, "tubelet": 1})
    return FrameViT(encoder, objective["latent_width"])
