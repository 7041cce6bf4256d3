"""I-JEPA (Assran et al., 2023, arXiv 2301.08243) predicts the features of hidden blocks.

Shape legend: B images, N patches, K context tokens, M target blocks, T tokens per block, D width,
L = M * T.
"""

from __future__ import annotations

from models.encoders.kept_tokens import KeptTokens, grids_of
from models.encoders.vit import gather_tokens
from models.media.preprocessing import normalize
from models.objectives.latent import LatentPrediction
from models.objectives.objective import Batch, Output
from models.objectives.registry import register_objective


@register_objective("ijepa")
class IJEPA(LatentPrediction):
    """Predicts each target block of an image separately, from a context that all blocks share."""

    inputs = ("images", "context_ids", "target_ids")

    def forward(self, batch: Batch) -> Output:
        """Computes the mean distance between predicted and target tokens over all blocks.

        Args:
            batch: `images`, `context_ids` [B, K] and `target_ids` [B, M, T]; see `Batch`.
        """
        images = normalize(batch["images"], self.mean, self.std)
        context_ids_BK, target_ids_BMT = batch["context_ids"], batch["target_ids"]
        patches_BNP = self.encoder.patch_embed.patchify(images)
        kept = KeptTokens.of(batch)
        pooled_BD, targets_BND = self.encode_target(patches_BNP, kept)
        targets_BLD = gather_tokens(targets_BND, target_ids_BMT.flatten(1))
        targets_BMTD = targets_BLD.view(*target_ids_BMT.shape, -1)
        grids = grids_of(kept)
        context_BKD = self.encoder.forward_patches(patches_BNP, context_ids_BK, grids)
        loss = self.prediction_loss(
            *(context_BKD, context_ids_BK, targets_BMTD, target_ids_BMT), grids_B2=grids
        )
        monitored = {
            "target_pooled": pooled_BD,
            "context_pooled": context_BKD.mean(1).float(),
        }
        return Output(loss, monitored=monitored)
