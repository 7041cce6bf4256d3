"""I-JEPA (Assran et al., 2023, arXiv 2301.08243): predict the features of hidden blocks.

Shape legend: B images, N patches, K context tokens, M target blocks, T tokens of a block, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from models.ema import make_target, update_target
from models.objectives.objective import Batch, Objective, Output
from models.predictor import Predictor
from models.preprocessing import normalize
from models.vit import LN_EPS, VisionTransformer, gather_tokens

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DISTANCES: dict[str, Distance] = {
    "smooth_l1": functional.smooth_l1_loss,
    "l2": functional.mse_loss,
    "l1": functional.l1_loss,
}


class IJEPA(Objective):
    """Context encoder, EMA target encoder and predictor.

    Args:
        encoder: the context encoder; the target encoder starts as its copy.
        predictor: maps context tokens and target positions to target tokens.
        loss: row of `DISTANCES`.
        ema: target momentum at the first and the last step, linear between.
        target: `ema`, or `self` for the negative control that must collapse: no target encoder, no
            stop-gradient.
        mean: channel means removed from images.
        std: channel standard deviations removed from images.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        loss: str = "smooth_l1",
        ema: tuple[float, float] = (0.996, 1.0),
        target: str = "ema",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.target_encoder: VisionTransformer | None
        self.target_encoder = make_target(encoder) if target == "ema" else None
        self.distance = DISTANCES[loss]
        self.ema = ema
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @property
    def feature_encoder(self) -> VisionTransformer:
        """The target encoder (the control has none: its own context encoder)."""
        return self.encoder if self.target_encoder is None else self.target_encoder

    def forward(self, batch: Batch) -> Output:
        """Mean distance between predicted and target tokens of all blocks."""
        images = normalize(batch["images"], self.mean, self.std)
        patches_BNP = self.encoder.patch_embed.patchify(images)
        tokens_BND, targets_BMTD = self._targets(patches_BNP, batch["target_ids"])
        context_BKD = self.encoder.forward_patches(patches_BNP, batch["context_ids"])
        predicted_BMTD = self.predictor(context_BKD, batch["context_ids"], batch["target_ids"])
        loss = self.distance(predicted_BMTD.float(), targets_BMTD.float())
        return Output(loss, monitored={"target_pooled": tokens_BND.detach().mean(1).float()})

    def _targets(
        self, patches_BNP: torch.Tensor, ids_BMT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Target features: the whole image encoded, normalised without affine, then gathered."""
        if self.target_encoder is None:
            tokens_BND = self.encoder.forward_patches(patches_BNP)
        else:
            with torch.no_grad():
                tokens_BND = self.target_encoder.forward_patches(patches_BNP)
        normed_BND = functional.layer_norm(tokens_BND, tokens_BND.shape[-1:], eps=LN_EPS)
        gathered_BLD = gather_tokens(normed_BND, ids_BMT.flatten(1))  # L = M * T
        return tokens_BND, gathered_BLD.reshape(*ids_BMT.shape, -1)

    def momentum(self, step: int, total_steps: int) -> float:
        """Target momentum of optimizer step `step` (0-based)."""
        start, end = self.ema
        return start + (end - start) * step / total_steps

    def after_step(self, step: int, total_steps: int) -> None:
        """Moves the target encoder towards the context encoder."""
        if self.target_encoder is not None:
            update_target(self.target_encoder, self.encoder, self.momentum(step, total_steps))
