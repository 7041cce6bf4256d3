"""V-JEPA (Bardes et al., 2024, arXiv 2404.08471) predicts the features of hidden regions of clips.

Shape legend: B clips, N tokens per clip, P pixel values per token, K context tokens, T target
tokens, D width, G mask generators.
"""

from __future__ import annotations

import torch

from models.encoders.from_settings import Settings, predictor_from_settings
from models.encoders.kept_tokens import KeptTokens, grids_of
from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer, gather_tokens
from models.media.preprocessing import normalize
from models.objectives.latent import LatentPrediction
from models.objectives.objective import Batch, Output
from models.objectives.registry import register_objective


@register_objective("vjepa")
class VJEPA(LatentPrediction):
    """Predicts hidden regions under several masks of a clip, which share one target pass.

    V-JEPA uses a short-range and a long-range mask. There is one mask generator for each mask token
    of the predictor, and the number of context and target tokens can differ between generators.
    """

    @classmethod
    def make_predictor(cls, model: Settings, encoder: VisionTransformer) -> Predictor:
        """Builds the predictor with one mask token per generator, initialised to zero."""
        count = model.get("mask_tokens", 2)  # the paper's short and long range
        return predictor_from_settings(model, encoder, mask_tokens=count, zero_mask_tokens=True)

    @property
    def inputs(self) -> tuple[str, ...]:
        """`clips`, and `context_ids_g` and `target_ids_g` for every generator g."""
        masks = range(len(self.predictor.mask_token))
        return ("clips", *(f"{part}_ids_{g}" for g in masks for part in ("context", "target")))

    def forward(self, batch: Batch) -> Output:
        """Computes the mean distance of target tokens per generator, averaged over generators.

        Args:
            batch: the entries in `inputs`, see `Batch`.
        """
        clips = normalize(batch["clips"], self.mean, self.std)
        patches_BNP = self.encoder.patch_embed.patchify(clips)
        kept = KeptTokens.of(batch)
        pooled_BD, targets_BND = self.encode_target(patches_BNP, kept)
        grids = grids_of(kept)
        losses, contexts = zip(
            *(
                self._mask_loss(
                    *(patches_BNP, targets_BND, batch[f"context_ids_{g}"]),
                    *(batch[f"target_ids_{g}"], g, grids),
                )
                for g in range(len(self.predictor.mask_token))
            ),
            strict=True,
        )
        losses_G = torch.stack(losses)
        metrics = {f"loss_{g}": loss for g, loss in enumerate(losses_G.detach())}
        monitored = {
            "target_pooled": pooled_BD,
            "context_pooled": torch.cat(contexts),
        }
        return Output(losses_G.mean(), metrics, monitored)

    def _mask_loss(
        self,
        patches_BNP: torch.Tensor,
        targets_BND: torch.Tensor,
        context_ids_BK: torch.Tensor,
        target_ids_BT: torch.Tensor,
        mask: int,
        grids_B2: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss of one mask and the mean of its context tokens, fp32 [B, D]."""
        context_BKD = self.encoder.forward_patches(patches_BNP, context_ids_BK, grids_B2)
        targets_BTD = gather_tokens(targets_BND, target_ids_BT)
        loss = self.prediction_loss(
            *(context_BKD, context_ids_BK, targets_BTD[:, None], target_ids_BT[:, None]),
            mask=mask,
            grids_B2=grids_B2,
        )
        return loss, context_BKD.mean(1).float()
