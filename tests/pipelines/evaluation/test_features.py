"""Labelled rows and their features, on real images.

N images, D features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from helpers.pipelines.evaluation import PREP, Shards, small_encoder
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing, normalize
from pipelines.config.data import DataConfig
from pipelines.config.run import RunConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.dataset.row_groups import read_row_group
from pipelines.dataset.rows import PLACE, iter_labelled, load_labelled, read_places, table_labels
from pipelines.dataset.shards import (
    read_manifest,
    read_rows,
    write_manifest,
    write_shard,
)
from pipelines.evaluation.features import (
    compute_features,
    decode_all,
    decode_batches,
    extract_features,
    pixel_features,
)
from pipelines.runtime.uris import open_uri
from pipelines.training.probes.online_probe import build_probe


@pytest.fixture
def encoder() -> VisionTransformer:
    return small_encoder()


def test_limited_rows_are_a_fixed_random_subset_in_order(cifar_shards: Shards) -> None:
    everything, some = load_labelled(cifar_shards[0]), load_labelled(cifar_shards[0], 100)
    assert some.num_rows == 100
    assert some.equals(load_labelled(cifar_shards[0], 100))
    order = {v: i for i, v in enumerate(everything["sample_id"].to_pylist())}
    positions = [order[v] for v in some["sample_id"].to_pylist()]
    assert positions == sorted(positions)
    assert max(positions) > everything.num_rows // 2  # not the first hundred
    assert len(set(table_labels(some))) == 10


def _with_few_labels(uri: str, folder: Path) -> str:
    """The data set with every tenth row labelled, in a single shard."""
    fs, root = open_uri(folder)
    rows = read_rows(uri)
    labels = [v if i % 10 == 3 else None for i, v in enumerate(rows["label"].to_pylist())]
    table = rows.set_column(4, "label", pa.array(labels, pa.int32()))
    shard = write_shard(fs, root, table, 16)
    write_manifest(folder, dataclasses.replace(read_manifest(uri), shards=(shard,)))
    return str(folder)


def test_limit_counts_labelled_rows_and_reads_few_row_groups(
    cifar_shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = _with_few_labels(cifar_shards[0], tmp_path)  # 51 of 512 rows
    everything, some = load_labelled(uri), load_labelled(uri, 20)
    assert everything.num_rows == 51
    assert some.num_rows == 20
    assert min(table_labels(some)) >= 0
    assert set(some["sample_id"].to_pylist()) < set(everything["sample_id"].to_pylist())
    assert load_labelled(uri, 60).equals(everything)

    whole = []

    def counted(fs, root, file, group, columns):  # type: ignore[no-untyped-def]
        whole.append(group) if "image" in columns else None
        return read_row_group(fs, root, file, group, columns)

    monkeypatch.setattr("pipelines.dataset.rows.read_row_group", counted)
    load_labelled(cifar_shards[0], 100)  # 32 row groups of 16
    assert len(whole) == 7


def test_classes_that_differ_leave_no_online_probe(cifar_shards: Shards, tmp_path: Path) -> None:
    train, test = cifar_shards
    for path in Path(test).glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = read_manifest(test)
    said: list[str] = []
    for classes in (manifest.classes, manifest.classes[::-1], manifest.classes[1:]):
        write_manifest(tmp_path, dataclasses.replace(manifest, classes=classes))
        cfg = PretrainConfig(
            data=DataConfig(train=train, test=str(tmp_path)),
            model=ModelConfig(image_size=32, patch_size=8),
            run=RunConfig(probe_every=5),
        )
        assert bool(build_probe(cfg, said.append)) == (classes == manifest.classes)
    shared = "no online kNN: --data.train and --data.test have different classes: "
    assert [line.partition("; ")[0] for line in said] == [
        *(shared + differing for differing in ("their order", "airplane")),
    ]


def test_rows_are_found_again_by_their_place(cifar_shards: Shards) -> None:
    table = load_labelled(cifar_shards[0], 50)
    places_N3 = np.stack([table[name].to_numpy() for name in PLACE], axis=1)
    again = read_places(cifar_shards[0], places_N3[[7, 3, 40]])
    assert again["sample_id"].to_pylist() == table["sample_id"].take([7, 3, 40]).to_pylist()


def test_features_do_not_depend_on_batching(
    cifar_shards: Shards, encoder: VisionTransformer
) -> None:
    table = load_labelled(cifar_shards[1], 70)
    whole = extract_features(encoder, PREP, table, batch_size=70)
    parts = extract_features(encoder, PREP, iter_labelled(cifar_shards[1], 70), batch_size=16)
    assert whole.shape == (70, 48)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    decoded = extract_features(encoder, PREP, decode_all(table, PREP), batch_size=70)
    np.testing.assert_array_equal(decoded, whole)
    patches = extract_features(encoder, PREP, table, batch_size=70, pooling="patches")
    assert patches.shape == (70, 16, 48)
    np.testing.assert_allclose(patches.mean(axis=1), whole, atol=1e-5)


def test_features_are_the_encoders_own(cifar_shards: Shards, encoder: VisionTransformer) -> None:
    table = load_labelled(cifar_shards[1], 5)
    images = decode_all(table, PREP).pixels
    expected = encoder(normalize(images, PREP.mean, PREP.std)).mean(dim=1).detach().numpy()
    encoder.train()
    np.testing.assert_allclose(extract_features(encoder, PREP, table), expected, atol=1e-6)
    assert encoder.training  # left as it was


def test_bfloat16_features_are_close_and_fp32(
    cifar_shards: Shards, encoder: VisionTransformer
) -> None:
    table = load_labelled(cifar_shards[1], 8)
    exact = extract_features(encoder, PREP, table)
    rough = extract_features(encoder, PREP, table, autocast=True)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1


def test_raw_pixels_are_the_normalised_image_shrunk_to_32(cifar_shards: Shards) -> None:
    table = load_labelled(cifar_shards[1], 4)
    images = decode_all(table, PREP)
    pixels = pixel_features(PREP)(images)
    assert torch.equal(pixels, normalize(images.pixels, PREP.mean, PREP.std).flatten(1))
    large = Preprocessing(image_size=96, mean=PREP.mean, std=PREP.std)
    assert pixel_features(large)(decode_all(table, large)).shape == (4, 3072)


def test_a_damaged_image_stops_the_job_by_its_reason() -> None:
    rows = pa.table({"image": [b"not an image"]})
    with pytest.raises(ValueError, match="not_an_image"):
        list(decode_batches(rows, PREP, 4))


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        compute_features({"pixels": pixel_features(PREP)}, [])
