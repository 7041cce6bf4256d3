"""What LeJEPA and VICReg have in common: several views of a sample, one encoder and a projector.

Shape legend: B images or clips, V views, N tokens in a view, K tokens that the encoder computes for
a view, P pixel values per token, D encoder width, E embedding width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from models.encoders.linear import Linear
from models.encoders.vit import VisionTransformer, gather_tokens
from models.objectives.objective import Batch, EncoderObjective, Output
from models.objectives.view_regions import pick_tokens, regions_in_view, shows_none
from models.synced import SyncedBatchNorm
from models.views import Views, kept_tokens, token_order, view_draws

WATCHED_COLUMNS = 512
"""Number of embedding columns that the collapse watch reads.

The watch keeps a matrix of this many rows and columns. Any subset of the columns shows a collapse.
"""


class JointEmbedding(EncoderObjective):
    """Trains the embeddings of several views of a sample to agree without collapsing.

    Args:
        encoder: encodes every view; the mean of its tokens is what is evaluated later.
        views: how views are made.
        projector: widths of the layers of the MLP that maps D to E; the last one is E.
        mean: channel means that are subtracted from the views, of values in [0, 1].
        std: channel standard deviations that the views are divided by.
    """

    pixels: ClassVar[str] = "images"
    """Name of the batch entry that views are made from: `images` or `clips`."""

    def __init__(
        self,
        encoder: VisionTransformer,
        views: Views,
        *,
        projector: Sequence[int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__(encoder, mean=mean, std=std)
        self.views = views
        self.projector = make_projector([encoder.width, *projector])

    @property
    def inputs(self) -> tuple[str, ...]:
        """The pixels and the sample keys, from which the random views follow."""
        return (self.pixels, "sample_keys")

    @property
    def regularizable(self) -> tuple[str, ...]:
        """The pooled features and the embeddings of the first view."""
        return ("target_pooled", "embedded")

    @property
    def watched(self) -> dict[str, int]:
        """The features and the embeddings.

        Embeddings can collapse while the encoder's features remain as they were at the start.
        """
        last = self.projector[-1]
        assert isinstance(last, nn.Linear)
        return {**super().watched, "embedded": min(last.out_features, WATCHED_COLUMNS)}

    def forward(self, batch: Batch) -> Output:
        """Embeds all views of the batch and applies `compare` to the embeddings."""
        regions_BR4 = batch.get("regions")
        pooled_VBD = self.embed(batch[self.pixels], batch["sample_keys"], regions_BR4)
        V, B, _ = pooled_VBD.shape
        embedded_VBE = self.projector(pooled_VBD.flatten(0, 1)).view(V, B, -1)
        with torch.autocast(embedded_VBE.device.type, enabled=False):
            loss, metrics = self.compare(embedded_VBE.float())
        monitored = {"target_pooled": pooled_VBD[0], "embedded": embedded_VBE[0].float()}
        return Output(loss, metrics, monitored)

    @abstractmethod
    def compare(self, embedded_VBE: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of the embeddings; called with autocast disabled.

        Args:
            embedded_VBE: embeddings of all views, fp32 [V, B, E].

        Returns:
            The loss, a scalar, and its parts by name as detached scalars.
        """

    def embed(
        self, pixels: torch.Tensor, keys_B: torch.Tensor, regions_BR4: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes every view; views of the same size are encoded in one pass.

        Args:
            pixels: uint8 images [B, 3, H, W] or clips [B, 3, T, H, W].
            keys_B: sample keys, int64 [B].
            regions_BR4: regions that are left out, as fractions of the picture, float [B, R, 4];
                None for none.

        Returns:
            The mean token of every view, fp32 [V, B, D].
        """
        channels = (-1,) + (1,) * (pixels.ndim - 2)
        mean, std = self.mean.view(channels), self.std.view(channels)
        views = [(view - mean) / std for view in self.views.make(pixels, keys_B)]
        count = (
            self.views.globals if self.views.local_size != self.views.global_size else len(views)
        )
        parts = [part for part in (views[:count], views[count:]) if part]
        firsts = (0, count)
        pooled = [
            self._encode(torch.stack(part), keys_B, first, regions_BR4)
            for part, first in zip(parts, firsts, strict=False)
        ]
        return torch.cat(pooled)

    def _encode(
        self,
        views: torch.Tensor,
        keys_B: torch.Tensor,
        first: int,
        regions_BR4: torch.Tensor | None,
    ) -> torch.Tensor:
        V, B = views.shape[:2]
        patches = self.encoder.patch_embed.patchify(views.flatten(0, 1))  # [V * B, N, P]
        height, width = views.shape[-2:]
        places_N = self._places(height, width, patches.device)
        steps = views.shape[3] // self.encoder.tubelet if views.ndim == 6 else 1
        per_step = len(places_N) // steps
        lasts, keep = self.views.kept(steps, per_step)
        if regions_BR4 is not None:
            chosen = [
                self._outside(keys_B, first + v, regions_BR4, views.shape[-2:], steps)
                for v in range(V)
            ]
            return self._encode_kept(patches, places_N, chosen)
        if keep < len(places_N):
            ids = torch.cat(
                [kept_tokens(keys_B, first + v, steps, per_step, lasts, keep) for v in range(V)]
            )
            patches = patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
            places = places_N[ids]
        else:
            places = places_N.expand(V * B, -1)
        tokens = self.encoder.forward_tokens(patches, places)
        return tokens.float().mean(1).view(V, B, -1)

    def _outside(
        self,
        keys_B: torch.Tensor,
        view: int,
        regions_BR4: torch.Tensor,
        size: torch.Size,
        steps: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses tokens of a view that show no region; returns numbers and validity, [B, K]."""
        rows, columns = (side // self.encoder.patch_size for side in size)
        moved_BR4 = regions_in_view(self.views, view_draws(keys_B, view), view, regions_BR4)
        free_BN = shows_none(moved_BR4, rows, columns).repeat(1, steps)
        lasts, keep = self.views.kept(steps, rows * columns)
        order_BN, inside_BN = token_order(keys_B, view, steps, rows * columns, lasts)
        return pick_tokens(order_BN, free_BN & inside_BN, keep)

    def _encode_kept(
        self,
        patches: torch.Tensor,
        places_N: torch.Tensor,
        chosen: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Encodes chosen tokens of every view, [V, B, D]; zero for a view without any token."""
        most = max(ids.shape[1] for ids, _ in chosen)
        ids, valid = (
            torch.cat([functional.pad(part[i], (0, most - part[i].shape[1])) for part in chosen])
            for i in (0, 1)
        )
        tokens = self.encoder.forward_tokens(
            gather_tokens(patches, ids), places_N[ids], valid_BK=valid | ~valid.any(1, keepdim=True)
        )
        summed = (tokens.float() * valid[..., None]).sum(1)
        pooled = summed / valid.sum(1, keepdim=True).clamp(min=1)
        return pooled.view(len(chosen), -1, pooled.shape[-1])

    def _places(self, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """Returns the grid positions of a view's tokens; small views are spread over the grid."""
        grid = self.encoder.grid
        rows, columns = (
            ((torch.arange(count, device=device) + 0.5) * whole / count).long()
            for count, whole in (
                (height // self.encoder.patch_size, grid.rows),
                (width // self.encoder.patch_size, grid.columns),
            )
        )
        times = torch.arange(grid.tubes, device=device) * grid.per_step
        return (times[:, None, None] + rows[:, None] * grid.columns + columns).flatten()


def make_projector(widths: Sequence[int]) -> nn.Sequential:
    """Builds an MLP with these layer widths, the input's first.

    Batch normalisation over all processes and a ReLU follow every layer but the last.
    """
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths[:-1]):
        layers += [Linear(inner, outer, bias=False), SyncedBatchNorm(outer), nn.ReLU()]
    return nn.Sequential(*layers, Linear(widths[-2], widths[-1]))
