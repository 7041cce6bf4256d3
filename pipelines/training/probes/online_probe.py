"""Online probe: kNN accuracy on labelled images or clips during training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from models.encoders.input_batch import InputBatch
from pipelines.config.data import DataConfig
from pipelines.config.train import PretrainConfig
from pipelines.loading.clips import training_sampler

BANK_ROWS = 2000
QUERY_ROWS = 1000


class OnlineProbe:
    """kNN accuracy (k = 20, cosine, T = 0.07) of test samples against a bank of training samples.

    The bank is of the first set of --data.train and --data.mix that has the classes of --data.test.
    The samples are fixed. They are decoded once, with the evaluation transform, and kept as uint8
    on the host.
    """

    def __init__(self, cfg: PretrainConfig) -> None:
        # Imported here, because only rank 0 needs these, and only if the run has a probe.
        from pipelines.dataset.rows import load_labelled, table_labels
        from pipelines.evaluation.features import decode_all, preprocessing_of

        bank = _labelled_set(cfg.data)
        self._autocast = cfg.run.precision == "bf16"
        self._prep = preprocessing_of(cfg.model)
        sampler = training_sampler(cfg)
        self._samples: list[InputBatch] = []
        self._labels: list[np.ndarray] = []
        for uri, rows in ((bank, BANK_ROWS), (cfg.data.test, QUERY_ROWS)):
            table = load_labelled(uri, rows)
            self._samples.append(decode_all(table, self._prep, sampler))
            self._labels.append(table_labels(table))

    def __call__(self, encoder: nn.Module) -> float:
        """Returns the accuracy as a fraction."""
        from pipelines.evaluation.features import extract_features
        from pipelines.evaluation.probes.knn import knn_accuracy

        bank, query = (
            extract_features(encoder, self._prep, x, autocast=self._autocast) for x in self._samples
        )
        return knn_accuracy(bank, self._labels[0], query, self._labels[1])


def _labelled_set(data: DataConfig) -> str:
    """Returns the first of the sets that the run trains on that has the classes of --data.test.

    Of several sets the new footage, --data.train, often has no labels.

    Raises:
        ValueError: none has; says what is wrong with --data.train.
    """
    from pipelines.dataset.rows import check_classes
    from pipelines.dataset.shards import read_manifest

    test, refused = read_manifest(data.test), list[ValueError]()
    for flag, uri in [("--data.train", data.train), *(("--data.mix", uri) for uri in data.mix)]:
        try:
            check_classes({flag: read_manifest(uri), "--data.test": test})
        except ValueError as error:
            refused.append(error)
        else:
            return uri
    raise refused[0]


def build_probe(cfg: PretrainConfig, say: Callable[[str], None]) -> OnlineProbe | None:
    """Builds the probe that `cfg` asks for; None if it asks for none, or says why there is none."""
    if not cfg.run.probe_every:
        return None
    if not cfg.data.test:
        say("no online kNN: --run.probe-every needs labelled shards in --data.test")
        return None
    try:
        return OnlineProbe(cfg)
    except ValueError as error:
        say(f"no online kNN: {error}")
        return None
