"""V-JEPA (Bardes et al., 2024, arXiv 2404.08471): predict the features of a clip's hidden regions.

Shape legend: B clips, N tokens of a clip, P pixel values of a token, K context tokens, T target
tokens, D width.
"""

from __future__ import annotations

import torch

from models.encoders.from_settings import Settings, predictor_from_settings
from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer, gather_tokens
from models.media.preprocessing import normalize
from models.objectives.latent import LatentPrediction
from models.objectives.objective import Batch, Output
from models.objectives.registry import register_objective


@register_objective("vjepa")
class VJEPA(LatentPrediction):
    """Several masks of a clip (V-JEPA: one of short, one of long range) share one target pass.

    There are as many mask generators as the predictor has mask tokens; each has lengths of its own.
    """

    @classmethod
    def make_predictor(cls, model: Settings, encoder: VisionTransformer) -> Predictor:
        """Builds the predictor, with one mask token a generator that starts at zero."""
        count = model.get("mask_tokens", 2)  # the paper's short and long range
        return predictor_from_settings(model, encoder, mask_tokens=count, zero_mask_tokens=True)

    @property
    def inputs(self) -> tuple[str, ...]:
        """`clips`, and for every generator g its `context_ids_g` and `target_ids_g`."""
        masks = range(len(self.predictor.mask_token))
        return ("clips", *(f"{part}_ids_{g}" for g in masks for part in ("context", "target")))

    def forward(self, batch: Batch) -> Output:
        """Mean over the generators of the mean distance of their target tokens."""
        clips = normalize(batch["clips"], self.mean, self.std)
        patches_BNP = self.encoder.patch_embed.patchify(clips)
        tokens_BND, targets_BND = self.encode_target(patches_BNP)
        losses, contexts = zip(
            *(
                self._mask_loss(
                    patches_BNP, targets_BND, batch[f"context_ids_{g}"], batch[f"target_ids_{g}"], g
                )
                for g in range(len(self.predictor.mask_token))
            ),
            strict=True,
        )
        losses_G = torch.stack(losses)
        metrics = {f"loss_{g}": loss for g, loss in enumerate(losses_G.detach())}
        monitored = {
            "target_pooled": tokens_BND.mean(1).float(),
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one mask, and its mean context tokens [B, D]."""
        context_BKD = self.encoder.forward_patches(patches_BNP, context_ids_BK)
        predicted_B1TD = self.predictor(context_BKD, context_ids_BK, target_ids_BT[:, None], mask)
        targets_BTD = gather_tokens(targets_BND, target_ids_BT)
        loss = self.distance(predicted_B1TD[:, 0].float(), targets_BTD.float())
        return loss, context_BKD.mean(1).float()
