"""I-JEPA's loss with the disjoint masks of DMJD (Ma et al., 2023, *Disjoint Masking with Joint
Distillation*, arXiv 2301.00230).

The target encoder accounts for about half the cost of an I-JEPA step. Here it runs once for C
contexts, whose disjoint targets together cover the whole image. The other part of DMJD, a loss on
visible tokens, is not implemented.

Shape legend: B images, N patches, C contexts per image, K context tokens, T target tokens per
context, P pixel values per patch, D width.
"""

from __future__ import annotations

from models.encoders.kept_tokens import KeptTokens
from models.encoders.vit import gather_tokens
from models.media.preprocessing import normalize
from models.objectives.latent import LatentPrediction
from models.objectives.objective import Batch, Output
from models.objectives.registry import register_objective


@register_objective("dmjd")
class DMJD(LatentPrediction):
    """Predicts a different part of the image from each of several contexts."""

    inputs = ("images", "context_ids", "target_ids")

    def forward(self, batch: Batch) -> Output:
        """Computes the mean distance between predicted and target tokens over all contexts.

        Args:
            batch: `images`, `context_ids` [B, C, K] and `target_ids` [B, C, T]; context c predicts
                the targets c. See `Batch`.
        """
        images = normalize(batch["images"], self.mean, self.std)
        context_ids_BCK, target_ids_BCT = batch["context_ids"], batch["target_ids"]
        (B, C, K), T = context_ids_BCK.shape, target_ids_BCT.shape[2]
        patches_BNP = self.encoder.patch_embed.patchify(images)
        kept = KeptTokens.of(batch)
        pooled_BD, targets_BND = self.encode_target(patches_BNP, kept)
        targets = gather_tokens(targets_BND, target_ids_BCT.flatten(1)).view(B * C, 1, T, -1)
        seen = gather_tokens(patches_BNP, context_ids_BCK.flatten(1)).view(B * C, K, -1)
        context_ids = context_ids_BCK.flatten(0, 1)
        grids = None if kept is None else kept.grids_B2.repeat_interleave(C, dim=0)
        context = self.encoder.forward_tokens(seen, context_ids, grids)  # [B * C, K, D]
        target_ids = target_ids_BCT.flatten(0, 1)[:, None]
        loss = self.prediction_loss(context, context_ids, targets, target_ids, grids_B2=grids)
        monitored = {
            "target_pooled": pooled_BD,
            "context_pooled": context.mean(1).float(),
        }
        return Output(loss, monitored=monitored)
