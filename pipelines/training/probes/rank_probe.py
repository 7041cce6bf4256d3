"""RankMe and LiDAR on fixed training samples, to compare the runs of a sweep.

No label is read. The samples and their views are the same in every run on the same shards, whatever
the run's batch size, crops or views. Only runs with the same encoder shape can be compared.

Shape suffixes: N samples, Q views of each, D feature width.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from models.encoders.input_batch import InputBatch
from models.keyed_random.tensors import mix
from models.media.preprocessing import Preprocessing
from models.views import Views
from pipelines.config.data import DataConfig
from pipelines.config.train import PretrainConfig
from pipelines.config.views import ViewsConfig
from pipelines.evaluation.ranks import lidar, rankme
from pipelines.loading.clips import training_sampler

RANKME_ROWS, RANKME_CLIPS = 2048, 512
"""Samples kept decoded in memory: 512 clips of 16 frames at 224 pixels take 1.2 GB."""
LIDAR_ROWS, LIDAR_VIEWS = 512, 8
"""The LiDAR paper uses 1,000 samples and 50 views; fewer are cheap enough to read often."""


class RankProbe:
    """Computes an encoder's RankMe and LiDAR on samples that are decoded only once."""

    def __init__(self, cfg: PretrainConfig) -> None:
        from pipelines.evaluation.features import decode_all, preprocessing_of

        self._autocast = cfg.run.precision == "bf16"
        self._prep = preprocessing_of(cfg.model)
        sampler = training_sampler(cfg)
        table = _training_samples(cfg.data, RANKME_CLIPS if sampler else RANKME_ROWS)
        self._samples = decode_all(table, self._prep, sampler)
        # Views are cropped out of whole pictures of one size.
        fit = "squash" if self._prep.fit == "whole" else self._prep.fit
        self._views_prep = dataclasses.replace(self._prep, fit=fit, exclude=())
        # Spread over the whole set, because shards made from tars may be in class order.
        every = max(1, table.num_rows // LIDAR_ROWS)
        self._viewed_samples = self._samples[::every][:LIDAR_ROWS]
        if self._prep.partial:
            rows = [*range(0, table.num_rows, every)][:LIDAR_ROWS]
            self._viewed_samples = decode_all(table.take(rows), self._views_prep, sampler)
        # Not the run's own views, because a sweep may vary those.
        settings = dataclasses.asdict(ViewsConfig(globals=LIDAR_VIEWS))
        self._views = Views.of(settings, cfg.model.image_size)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Returns `fixed_rankme` (uncentred, as in its paper) and `lidar` of mean-pooled features.

        Both are NaN if the features are not finite.
        """
        features_ND = torch.from_numpy(self._features(encoder, self._samples, self._prep))
        if not torch.isfinite(features_ND).all():
            return {"fixed_rankme": math.nan, "lidar": math.nan}
        return {"fixed_rankme": rankme(features_ND), "lidar": lidar(self._viewed(encoder))}

    def _viewed(self, encoder: nn.Module) -> Tensor:
        """Features of every view of some of the samples, [N, Q, D]."""
        from pipelines.evaluation.features import clips_per_batch

        samples = self._viewed_samples.pixels
        keys_N = mix(torch.arange(len(samples)))
        frames = samples.shape[2] if samples.ndim == 5 else 1
        size = clips_per_batch(256, frames * LIDAR_VIEWS)
        parts = []
        batches = zip(torch.split(samples, size), torch.split(keys_N, size), strict=True)
        for pixels, keys in batches:
            views = torch.cat(self._views.make(pixels, keys))
            rounded = InputBatch((255 * views).round().to(torch.uint8))
            found_QD = self._features(encoder, rounded, self._views_prep)
            parts.append(found_QD.reshape(LIDAR_VIEWS, len(pixels), -1).swapaxes(0, 1))
        return torch.from_numpy(np.concatenate(parts))

    def _features(self, encoder: nn.Module, samples: InputBatch, prep: Preprocessing) -> np.ndarray:
        from pipelines.evaluation.features import extract_features

        return extract_features(encoder, prep, samples, autocast=self._autocast)


def _training_samples(data: DataConfig, most: int) -> pa.Table:
    """Reads samples of every set that the run trains on, as many of each as its share."""
    from pipelines.dataset.rows import load_samples

    rows, uris = data.rows_by_set, (data.train, *data.mix)
    counts = [max(1, most * share // sum(rows)) for share in rows]
    parts = [load_samples(uri, count) for uri, count in zip(uris, counts, strict=True)]
    return pa.concat_tables(parts)
