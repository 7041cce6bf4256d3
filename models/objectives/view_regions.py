"""Leaves regions of the picture out of its random views: which tokens of a view show none of them.

Shape legend: B images or clips, R regions, N tokens of a view, K tokens kept,
4 = (left, top, right, bottom) as fractions of a width and height.
"""

from __future__ import annotations

import torch

from models.media.regions import SLACK
from models.views import Draws, Views, crop_boxes


def regions_in_view(
    views: Views, draws: Draws, view: int, regions_BR4: torch.Tensor
) -> torch.Tensor:
    """Moves regions of pictures to their places in a view.

    Args:
        views: how views are made.
        draws: the uniform numbers of this view, see `Views.draws`.
        view: number of the view.
        regions_BR4: regions as fractions of the pictures; they may reach beyond them.

    Returns:
        The same regions as fractions of the view, float [B, R, 4].
    """
    left_B, top_B, wide_B, high_B = crop_boxes(
        draws, 1, 1, views.scale_of(view), views.augmentation.ratio
    )
    start_B14 = torch.stack([left_B, top_B, left_B, top_B], dim=1)[:, None]
    length_B14 = torch.stack([wide_B, high_B, wide_B, high_B], dim=1)[:, None]
    moved_BR4 = (regions_BR4 - start_B14) / length_B14
    flipped_B = draws["flip"] < views.augmentation.flip
    left, top, right, bottom = moved_BR4.unbind(-1)
    mirrored_BR4 = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
    return torch.where(flipped_B[:, None, None], mirrored_BR4, moved_BR4)


def shows_none(regions_BR4: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Returns which tokens of one time step touch none of the regions, bool [B, rows * columns].

    Args:
        regions_BR4: regions as fractions of what the grid shows.
        rows: rows of the grid.
        columns: columns of the grid.
    """
    left, top, right, bottom = regions_BR4[..., None].unbind(-2)  # [B, R, 1] each
    down_BRr = _covered(top, bottom, rows)
    across_BRc = _covered(left, right, columns)
    return ~(down_BRr[..., :, None] & across_BRc[..., None, :]).any(dim=1).flatten(1)


def _covered(low_BR1: torch.Tensor, high_BR1: torch.Tensor, count: int) -> torch.Tensor:
    """Returns which of `count` equal parts of [0, 1] a side covers in part, [B, R, count]."""
    edges = torch.arange(count + 1, device=low_BR1.device) / count
    overlap = torch.minimum(high_BR1, edges[1:]) - torch.maximum(low_BR1, edges[:-1])
    return overlap > SLACK / count


def pick_tokens(
    order_BN: torch.Tensor, allowed_BN: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the first allowed tokens in an order.

    Args:
        order_BN: any numbers; lower ones come first.
        allowed_BN: which tokens may be chosen.
        most: how many are chosen where there are as many.

    Returns:
        Numbers of the tokens, ascending, int64 [B, K], and which of them are not padding, bool
        [B, K]. K is the most that a row has.
    """
    count = allowed_BN.shape[1]
    last = torch.iinfo(order_BN.dtype).max
    first_BN = order_BN.masked_fill(~allowed_BN, last).argsort(1)
    chosen_B1 = allowed_BN.sum(1, keepdim=True).clamp(max=most)
    K = max(1, int(chosen_B1.max()))  # waits for the device; K changes with the crops
    places_K = torch.arange(K, device=order_BN.device)
    ids_BK = first_BN[:, :K].masked_fill(places_K >= chosen_B1, count).sort(1).values
    return ids_BK.clamp(max=count - 1), ids_BK < count
