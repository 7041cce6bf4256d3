"""The choice of a block: on held-out training samples, and on nothing else.

Shape legend: N samples, L blocks, D width of a block.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from helpers.pipelines.clips import segment, write_rows
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import normalize
from pipelines.config.jobs import EvaluateConfig
from pipelines.dataset.rows import load_labelled, table_labels
from pipelines.evaluate import evaluate
from pipelines.evaluation.arrays import held_out_split
from pipelines.evaluation.blocks import choice
from pipelines.evaluation.blocks.choice import (
    Blocks,
    BlockScores,
    chosen_encoders,
    score_blocks,
    with_chosen_blocks,
)
from pipelines.evaluation.features import decode_all
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes.knn import knn_accuracy
from pipelines.evaluation.report.block_scores import block_charts, block_table
from pipelines.evaluation.report.tables import comparison_table
from pipelines.evaluation.subject import load_subject, random_init, with_sampler

CPU = torch.device("cpu")
CFG = EvaluateConfig(checkpoint="c", data="d", test="t")


def part_of(
    blocks: Sequence[np.ndarray], labels_N: np.ndarray, numbers: dict | None = None
) -> ProbeSet:
    count = len(labels_N)
    return ProbeSet(
        uri="x",
        features={"encoder": np.concatenate(blocks, axis=1).astype(np.float32)},
        labels_N=labels_N,
        places_N3=np.zeros((count, 3), np.int64),
        ids_N16=np.zeros((count, 16), np.uint8),
        numbers=numbers or {},
    )


def noise(seed: int, count: int = 400, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width))


# --- scores


def test_the_block_that_knows_the_class_is_chosen() -> None:
    labels_N = np.arange(400) % 4
    knows = noise(1)
    knows[:, :4] += 3 * np.eye(4)[labels_N]
    hints = noise(2)
    hints[:, :4] += np.eye(4)[labels_N]
    part = part_of([noise(0), hints, knows, noise(3)], labels_N)
    found = score_blocks(part, "encoder", 4, CFG, CPU)
    assert found.chosen == 3
    assert found.accuracy == found.score
    assert found.accuracy[2] > 0.9
    assert found.accuracy[1] == pytest.approx(0.55, abs=0.2)
    assert max(found.accuracy[0], found.accuracy[3]) < 0.45  # chance is 0.25
    shuffled = dataclasses.replace(part, labels_N=np.random.default_rng(4).permutation(labels_N))
    assert max(score_blocks(shuffled, "encoder", 4, CFG, CPU).accuracy) < 0.45


def test_only_the_held_out_tenth_chooses() -> None:
    """The first block gives the class away on what is learned from and lies on what is not."""
    labels_N = np.arange(400) % 2
    held, fits = held_out_split(400, 0.1, CFG.seed)
    assert len(held) == 40
    assert sorted([*held, *fits]) == list(range(400))
    lies, honest = noise(0), noise(1)
    lies[fits, 0] += 20 * labels_N[fits]
    lies[held, 0] += 20 * (1 - labels_N[held])
    honest[:, 0] += 2 * labels_N
    found = score_blocks(part_of([lies, honest], labels_N), "encoder", 2, CFG, CPU)
    assert found.accuracy[0] == 0.0
    assert found.accuracy[1] > 0.6
    assert found.chosen == 2


def test_numbers_choose_by_r2_and_together_with_the_classes_by_the_mean() -> None:
    labels_N, value_N = np.arange(400) % 2, noise(5)[:, 0] * 7 + 100
    by_class, by_value = noise(6), noise(7)
    by_class[:, 0] += 2 * labels_N
    by_value[:, 0] = value_N
    value_N = value_N.copy()
    value_N[::9] = np.nan  # these samples have no number
    part = part_of([by_class, by_value], labels_N, {"x": value_N, "y": noise(8)[:, 0]})
    alone = score_blocks(part, "encoder", 2, dataclasses.replace(CFG, number=("x", "y")), CPU)
    assert alone.accuracy is None
    assert alone.chosen == 2
    assert alone.numbers["x"][1] > 0.99
    assert alone.numbers["x"][0] < 0.1
    assert alone.score[1] == pytest.approx((alone.numbers["x"][1] + 0) / 2, abs=0.05)
    both = dataclasses.replace(CFG, number=("x", "y"), state="3")
    found = score_blocks(part, "encoder", 2, both, CPU)
    assert found.numbers == alone.numbers
    expected = [
        np.mean([a, *(max(0, of[block]) for of in found.numbers.values())])
        for block, a in enumerate(found.accuracy)
    ]
    assert found.score == pytest.approx(expected)


def test_of_equal_blocks_the_last_one_is_chosen() -> None:
    same = noise(0)
    part = part_of([same, same, same], np.arange(400) % 2)
    assert score_blocks(part, "encoder", 3, CFG, CPU).chosen == 3


# --- the job


@pytest.fixture(scope="module")
def cfg(sets: tuple[str, str], checkpoint: str, tmp_path_factory: pytest.TempPathFactory):
    return EvaluateConfig(
        checkpoint=checkpoint,
        data=sets[0],
        test=sets[1],
        out=str(tmp_path_factory.mktemp("all")),
        layers="all",
        probe_epochs=2,
        attentive_epochs=1,
        knn_k=3,
    )


@pytest.fixture(scope="module")
def evaluation(cfg: EvaluateConfig) -> dict:
    """Every block, of which the encoder is made to choose the first and random init the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "score_blocks", _first_and_last)
        return evaluate(cfg, console=Console(quiet=True))


def _first_and_last(part: ProbeSet, row: str, depth: int, *rest) -> BlockScores:
    found = score_blocks(part, row, depth, *rest)
    return dataclasses.replace(found, chosen=1 if row == "encoder" else depth)


def test_the_rows_of_the_last_block_are_those_of_a_job_that_tries_no_other(
    evaluation: dict, cfg: EvaluateConfig, tmp_path: Path
) -> None:
    alone = dataclasses.replace(cfg, layers="last", out=str(tmp_path))
    results = evaluate(alone, console=Console(quiet=True))
    assert list(results["rows"]) == ["encoder", "random_init", "single_frame", "raw_pixels"]
    assert "blocks" not in results
    for name, row in results["rows"].items():
        assert evaluation["rows"][name] == row
    assert evaluation["task"] == results["task"]
    assert "<h2>Blocks</h2>" not in (tmp_path / "report.html").read_text()


def test_both_encoders_stand_at_the_blocks_that_they_chose(
    evaluation: dict, cfg: EvaluateConfig
) -> None:
    rows = evaluation["rows"]
    assert list(rows) == [
        *("encoder", "encoder_block", "random_init", "random_init_block"),
        *("single_frame", "raw_pixels"),
    ]
    assert rows["random_init_block"] == rows["random_init"]
    assert rows["encoder_block"].keys() == rows["encoder"].keys()
    assert 0 <= rows["encoder_block"]["attentive"]["accuracy"] <= 1
    assert rows["encoder_block"]["rankme"] != rows["encoder"]["rankme"]
    # kNN by the first block, which is run by hand.
    subject = with_sampler(cfg, load_subject(cfg.checkpoint), "video")
    encoder, prep = subject.encoder, subject.preprocessing
    tables = [load_labelled(uri) for uri in (cfg.data, cfg.test)]
    means = []
    for table in tables:
        pixels = decode_all(table, prep, subject.sampler).pixels
        patches = encoder.patch_embed.patchify(normalize(pixels, prep.mean, prep.std))
        with torch.no_grad():
            tokens = encoder.patch_embed(patches) + encoder.pos_embed
            means.append(encoder.norm(encoder.blocks[0](tokens)).mean(1))
    train, test = (table_labels(table) for table in tables)
    expected = knn_accuracy(means[0], train, means[1], test, k=3)
    assert rows["encoder_block"]["knn"] == pytest.approx(expected, abs=0.09)  # one of 12 clips


def test_results_and_report_hold_the_scores_of_every_block(
    evaluation: dict, cfg: EvaluateConfig
) -> None:
    assert json.loads((Path(cfg.out) / "results.json").read_text()) == evaluation
    blocks = evaluation["blocks"]
    assert blocks["samples"] == 24
    assert list(blocks["rows"]) == ["encoder", "random_init"]
    depth = len(blocks["rows"]["encoder"]["accuracy"])
    assert depth == load_subject(cfg.checkpoint).encoder.depth > 1
    html = (Path(cfg.out) / "report.html").read_text()
    section = html.partition("<h2>Blocks</h2>")[2].partition("</section>")[0]
    assert section.count('<polyline class="curve"') == 1
    assert section.count('<polyline class="curve beside"') == 1
    assert re.findall(r"<tr><td>(\d+)</td>", section) == [str(n + 1) for n in range(depth)]
    assert section.count('class="best"') == 2
    assert "Random init, chosen block" in html
    table = block_table(evaluation)
    assert table is not None
    chosen = [[cell.chosen for cell in cells] for cells in table.rows]
    assert chosen == [[n == 0, n == depth - 1] for n in range(depth)]
    assert block_charts(evaluation)[0]["title"] == "Accuracy"


def test_compared_encoders_stand_at_their_chosen_blocks_too(evaluation: dict) -> None:
    better = copy.deepcopy(evaluation)
    better["rows"]["encoder_block"]["attentive"]["accuracy"] = (
        evaluation["rows"]["random_init_block"]["attentive"]["accuracy"] + 0.125
    )
    table = comparison_table(evaluation, [better])
    names, leads = (list(table.columns[column].cells) for column in (0, 2))
    assert names == [
        *("clips, step 30", "clips, step 30 (2)"),
        *("clips, step 30, chosen block", "clips, step 30 (2), chosen block"),
        *("random init", "random init, chosen block", "single frame", "raw pixels"),
    ]
    assert leads[0] == leads[1]
    assert leads[3:] == ["+12.5", "-", "-", "-", "-"]


def test_labels_of_the_test_set_change_results_and_not_the_choice(
    cfg: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: labels of the training set do change it."""
    monkeypatch.setattr(choice, "HELD_OUT", 0.5)  # twelve clips tell blocks apart, two may not
    few = dataclasses.replace(cfg, attentive_epochs=0, probe_epochs=1, out=str(tmp_path / "out"))
    results = {
        name: evaluate(dataclasses.replace(few, **change), console=Console(quiet=True))
        for name, change in {
            "true": {},
            "test": {"test": other_labels(tmp_path / "test", range(24, 36))},
            "data": {"data": other_labels(tmp_path / "train", range(24))},
        }.items()
    }
    assert results["test"]["blocks"] == results["true"]["blocks"]
    knn = {name: found["rows"]["raw_pixels"]["knn"] for name, found in results.items()}
    assert knn["test"] != knn["true"]
    assert results["data"]["blocks"] != results["true"]["blocks"]


def other_labels(folder: Path, numbers: Iterable[int]) -> str:
    """Segments as those of `sets`, with labels by chance."""
    rng = np.random.default_rng(0)
    rows = [segment(number) | {"label": int(rng.integers(3))} for number in numbers]
    return write_rows(folder, rows)


def test_more_samples_than_fit_are_drawn_from(
    cfg: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_subject(cfg.checkpoint).encoder
    per_sample = 2 * 4 * encoder.depth * encoder.width
    monkeypatch.setattr(choice, "BLOCK_BYTES", 15 * per_sample + 1)
    few = dataclasses.replace(cfg, attentive_epochs=0, probe_epochs=1, out=str(tmp_path))
    results = evaluate(few, console=Console(quiet=True))
    assert results["blocks"]["samples"] == 15
    assert results["data"]["data"]["videos"] == 24


def test_an_encoder_that_chose_its_last_block_is_not_run_again(checkpoint: str) -> None:
    encoder = load_subject(checkpoint).encoder
    encoders = {"encoder": encoder, "random_init": random_init(encoder, 0)}
    scores = BlockScores(chosen=1, score=[], accuracy=None, numbers={})
    last = dataclasses.replace(scores, chosen=encoder.depth)
    blocks = Blocks(samples=9, rows={"encoder": last, "random_init": scores})
    (name, found), *others = chosen_encoders(blocks, encoders).items()
    assert (name, len(found.blocks), others) == ("random_init_block", 1, [])
    assert isinstance(found, VisionTransformer)
    rows = {"encoder": {"knn": 1}, "random_init": {"knn": 2}, "random_init_block": {"knn": 3}}
    assert with_chosen_blocks(rows, blocks) == {
        "encoder": {"knn": 1},
        "encoder_block": {"knn": 1},
        "random_init": {"knn": 2},
        "random_init_block": {"knn": 3},
    }
