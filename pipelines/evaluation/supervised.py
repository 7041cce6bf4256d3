"""The supervised baseline: an encoder of the same shape, trained from scratch on the labels alone.

The network is the encoder with a linear head on the mean of its tokens, standardised over a batch.
It is trained end to end by AdamW on the pixels that the probes see, without augmentation. It shows
what the labels teach a network of this size without any pretraining.

Shape suffixes: N clips or images, B of one step, T tokens, D width, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.encoders.input_batch import InputBatch, encode
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing
from pipelines.evaluation.arrays import Array, as_labels

Labelled: TypeAlias = tuple[InputBatch, Array]
"""Images or clips, and their classes [N]."""

LR, WEIGHT_DECAY, WARMUP, CLIP_NORM = 1e-3, 0.05, 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Accuracies of the network trained on the labels."""

    accuracy: float
    shift_accuracy: float | None
    train_accuracy: float
    epochs: int


class Classifier(nn.Module):
    """Maps uint8 pixels to logits.

    Args:
        encoder: the encoder to train.
        prep: how the pixels are normalised.
        classes: C, the number of classes.
    """

    def __init__(self, encoder: VisionTransformer, prep: Preprocessing, classes: int) -> None:
        super().__init__()
        self.encoder, self.prep = encoder, prep
        # As in the linear probe, without affine. Unstandardised features are dominated by what all
        # samples share, and a few hundred steps then teach nothing.
        self.standardise = nn.BatchNorm1d(encoder.width, affine=False)
        self.head = nn.Linear(encoder.width, classes)

    def forward(self, batch: InputBatch) -> Tensor:
        """Logits [B, C] of images or clips."""
        mean_BD = encode(self.encoder, batch, self.prep).mean()
        logits_BC: Tensor = self.head(self.standardise(mean_BD))
        return logits_BC


def supervised_baseline(
    encoder: VisionTransformer,
    prep: Preprocessing,
    train: Labelled,
    test: Labelled,
    shifted: Labelled | None = None,
    *,
    epochs: int,
    batch_size: int = 32,
    seed: int = 0,
) -> Supervised:
    """Trains `encoder` (its weights are overwritten) and scores it once, as the last step left it.

    AdamW (rate 1e-3, decay 0.05) with warm-up over a tenth of the steps, then cosine to zero;
    gradients are clipped at norm 1.

    Args:
        encoder: untrained, on the device to train on.
        prep: how the pixels are normalised.
        train: images or clips, and their classes [N].
        test: the same for the test set.
        shifted: a second test set.
        epochs: passes over the training set.
        batch_size: B.
        seed: fixes the head's weights and the order of samples.
    """
    device, labels_N = next(encoder.parameters()).device, as_labels(train[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(encoder, prep, int(labels_N.max()) + 1).to(device)
    _fit(model, train[0], labels_N, epochs, batch_size, seed)
    return Supervised(
        accuracy=_accuracy(model, test, batch_size),
        shift_accuracy=None if shifted is None else _accuracy(model, shifted, batch_size),
        train_accuracy=_accuracy(model, train, batch_size),
        epochs=epochs,
    )


def _fit(
    model: Classifier,
    samples: InputBatch,
    labels_N: Tensor,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    device, rng = next(model.parameters()).device, np.random.default_rng(seed)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    orders = (torch.from_numpy(rng.permutation(len(labels_N))) for _ in range(epochs))
    steps = [rows_B for order_N in orders for rows_B in torch.split(order_N, batch_size)]
    for step, rows_B in enumerate(steps):
        progress = (step + 1) / len(steps)
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
        optimizer.param_groups[0]["lr"] = LR * min(progress / WARMUP, cosine, 1)
        logits_BC = model(samples[rows_B])
        loss = F.cross_entropy(logits_BC, labels_N[rows_B].to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()


@torch.no_grad()
def _accuracy(model: Classifier, part: Labelled, batch_size: int) -> float:
    model.eval()
    hits, (samples, labels_N) = 0, (part[0], as_labels(part[1]))
    for rows_B in torch.split(torch.arange(len(labels_N)), batch_size):
        predicted_B = model(samples[rows_B]).argmax(-1).cpu()
        hits += int((predicted_B == labels_N[rows_B].cpu()).sum())
    return hits / len(labels_N)
