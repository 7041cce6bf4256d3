"""Adapting a finished run: its recipe, what it refuses, and one run on Ray."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from helpers.pipelines.fake_training import change, tiny_config
from helpers.pipelines.loading import encode, picture, row_of, write_rows
from helpers.pipelines.refusals import Told, teller
from helpers.pipelines.run_folders import train_run
from models.artifacts.alignment import alignment_bytes, load_alignment
from pipelines.adapt import adapt, check_probes, compare, parse
from pipelines.config.data import DataConfig
from pipelines.config.jobs import AdaptConfig, EvaluateConfig, OldFootageConfig, OldProbesConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import read_manifest, read_rows, write_manifest
from pipelines.evaluation.drift import feature_drift, paired_alignment
from pipelines.evaluation.probe_sets import ProbeSet
from pipelines.evaluation.probes.replaced import (
    ADAPTED,
    OLD,
    RANDOM,
    read_replaced,
    with_aligned,
)
from pipelines.evaluation.subject import load_subject
from pipelines.loading.mixing import identity_of, training_sets
from pipelines.recipes.adapted import adapted
from pipelines.runs.checkpoints import load_encoder
from pipelines.runs.finished import find_finished
from pipelines.training import launch
from pipelines.training.launch import complete


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return teller(monkeypatch, capsys)


def write_pictures(folder: Path, first: int, count: int) -> str:
    rows = [row_of(encode(picture(first + i, 32, 32), "PNG"), f"{i}") for i in range(count)]
    return write_rows(folder, rows)


# The recipe


def test_the_recipe_takes_over_all_but_the_schedule_and_the_data() -> None:
    old = tiny_config(Path("/runs"), name="old", steps=400, probe_every=4, seed=3)
    old = change(old, optim={"lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 40})
    new = adapted(old, "/runs/old/checkpoint_00000400", "/runs", AdaptConfig(rate=0.1, length=0.5))
    assert new.model == dataclasses.replace(old.model, fit="crop")  # as it was before the choice
    assert (new.objective, new.mask, new.views) == (old.objective, old.mask, old.views)
    assert (new.run.steps, new.optim.warmup_steps) == (200, 10)
    assert new.optim.lr == pytest.approx(1e-3)
    assert new.optim.final_lr == pytest.approx(1e-4)
    assert new.optim.weight_decay == new.optim.final_weight_decay == old.optim.final_weight_decay
    assert new.run.init_from == "/runs/old/checkpoint_00000400"
    assert (new.anchor.weight, new.anchor.checkpoint) == (1.0, new.run.init_from)
    assert (new.run.name, new.run.seed, new.run.probe_every) == ("old-adapted", 3, 0)
    assert (new.data.train, new.data.mix, new.data.mix_shares) == ("", ("memory",), (0.5,))


def test_old_footage_keeps_its_proportions_in_the_next_mix() -> None:
    """A run that was adapted twice still sees the first footage."""
    old = change(
        tiny_config(Path("/runs")),
        data={"train": "b", "mix": ("a",), "mix_shares": (0.5,), "published": (7, 0)},
    )
    data = adapted(old, "c", "/runs", AdaptConfig(mix=OldFootageConfig(old=0.5))).data
    assert (data.mix, data.mix_shares, data.published) == (("b", "a"), (0.25, 0.25), (0, 7, 0))
    alone = adapted(old, "c", "/runs", AdaptConfig(mix=OldFootageConfig(old=0))).data
    assert (alone.mix, alone.mix_shares, alone.published) == ((), (), ())
    assert adapted(old, "c", "/runs", AdaptConfig(mix=OldFootageConfig(old=0))).anchor.weight == 0
    parts = change(old, run={"accumulate": 4})
    assert adapted(parts, "c", "/runs", AdaptConfig()).anchor.weight == 0
    other = OldFootageConfig(old=0.25, data="x")
    named = adapted(old, "c", "/runs", AdaptConfig(mix=other)).data
    assert (named.mix, named.mix_shares) == (("x",), (0.25,))


def test_every_flag_of_pretraining_overrides_the_recipe(tmp_path: Path) -> None:
    train_run(tiny_config(tmp_path, name="old"))
    flags = f"--from {tmp_path}/old --data.train new --mix.old=0.25 --optim.lr 7 --run.name mine"
    cfg, old, run = parse(flags.split())
    assert (cfg.mix.old, old.step, old.uri) == (0.25, 12, f"{tmp_path}/old")
    assert (run.optim.lr, run.run.name, run.data.train) == (7, "mine", "new")
    assert (run.data.mix_shares, run.run.storage) == ((0.25,), str(tmp_path))


# What is refused


def test_what_is_no_finished_run(told: Told, tmp_path: Path) -> None:
    for name, file in (("sweep", "sweep.json"), ("encoder", "model.safetensors"), ("x", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    train_run(tiny_config(tmp_path, name="half", stop_after=8))
    for name, message in (
        ("nothing", "does not exist"),
        ("sweep", "a sweep; name one of its runs"),
        ("encoder", "an artifact, which has only the encoder"),
        ("x", "neither a checkpoint nor a run folder"),
        ("half", "the run has not finished (step 8 of 12)"),
    ):
        said = told("adapt", "--from", tmp_path / name, "--data.train", tmp_path)
        assert f"--from {tmp_path / name}" in said.replace("--from:", "--from")
        assert message in said
    assert find_finished(f"{tmp_path}/half/checkpoint_00000008", "--from").step == 8


def test_flags_that_cannot_work(
    told: Told, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = change(tiny_config(tmp_path, name="old"), data={"train": str(tmp_path)})
    train_run(run)
    here = ("--from", tmp_path / "old", "--data.train", write_pictures(tmp_path / "a", 0, 16))
    for flags, message in (
        (("--run.name", "old"), "--run.name: old is the run to adapt"),
        (("--mix.data", tmp_path / "none"), "--mix.data: "),
    ):
        assert message in told("adapt", *here, *flags)
    for flags, message in (
        (("--mix.old", "1"), "--mix.old: must be at least 0 and below 1"),
        (("--probe.train", tmp_path / "a"), "--probe.train: goes with --probe.test"),
        (("--data.train", tmp_path), "--data.mix: names a set twice"),
    ):
        with pytest.raises(SystemExit):  # tyro prints what a configuration refuses
            parse([str(word) for word in (*here, *flags)])
        assert message in capsys.readouterr().err


def test_probes_that_the_new_encoder_cannot_stand_in_for(tmp_path: Path) -> None:
    data, old = write_pictures(tmp_path, 0, 16), tiny_config(tmp_path)
    with pytest.raises(ValueError, match=r"--probe\.train: these shards have no labels"):
        check_probes(OldProbesConfig(train=data, test=data), old, old)
    manifest = dataclasses.replace(read_manifest(data), classes=("a", "b"))
    write_manifest(data, manifest)
    assert len(check_probes(OldProbesConfig(train=data, test=data, new=data), old, old)) == 3
    larger = change(old, model={"image_size": 64})
    with pytest.raises(ValueError, match=r"features of the same pixels"):
        check_probes(OldProbesConfig(train=data, test=data), old, larger)


# What is compared


def test_old_probes_are_read_on_the_features_of_the_adapted_encoder() -> None:
    """The adapted encoder has swapped two directions: old probes fail, new ones do not."""
    rng = np.random.default_rng(0)

    def part(count: int) -> ProbeSet:
        labels_N = np.arange(count) % 2
        old = rng.normal(0, 0.1, (count, 4)).astype(np.float32)
        old[:, 0] += 2 * labels_N - 1
        old[:, 1] -= 2 * labels_N - 1
        noise = rng.normal(size=(count, 4)).astype(np.float32)
        features = {OLD: old, ADAPTED: old[:, [1, 0, 2, 3]].copy(), RANDOM: noise}
        ids = np.zeros((count, 16), np.uint8)
        return ProbeSet("", features, labels_N, np.zeros((count, 3), np.int64), ids)

    # Of old footage without labels, of which the features of both encoders are known.
    unlabelled = part(300).features
    alignment = paired_alignment(unlabelled[ADAPTED], unlabelled[OLD])
    cfg = EvaluateConfig(checkpoint="", data="", test="", probe_epochs=20)
    sets = [with_aligned(part(count), alignment) for count in (200, 100, 60)]
    found = read_replaced(sets, cfg, heads=2)
    for footage in ("old_footage", "new_footage"):
        rows = found[footage]
        for probe in ("knn", "linear"):
            assert rows["old"][probe] == rows["refitted"][probe] == rows["aligned"][probe] == 1.0
            assert rows["adapted"][probe] == 0.0
            assert 0.2 < rows["random"][probe] < 0.8
    without = read_replaced([part(200), part(100)], cfg, heads=2)
    assert without.keys() == {"old_footage"}
    assert without["old_footage"].keys() == {"old", "adapted", "refitted", "random"}


def test_drift_tells_a_rotation_from_a_change() -> None:
    rng = np.random.default_rng(0)
    old_ND = rng.normal(size=(500, 8)) + 5
    assert feature_drift(old_ND, old_ND) == pytest.approx({"cosine": 1, "cka": 1})
    turned_ND = old_ND @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert feature_drift(old_ND, turned_ND)["cka"] == pytest.approx(1)
    assert abs(feature_drift(old_ND - 5, turned_ND - 5)["cosine"]) < 0.9
    assert feature_drift(old_ND, rng.normal(size=(500, 8)))["cka"] < 0.1
    back = paired_alignment(turned_ND, old_ND)
    assert feature_drift(old_ND, back(turned_ND))["cosine"] > 0.999
    tokens_NTD = rng.normal(size=(3, 5, 8)).astype(np.float16)
    assert back(tokens_NTD).dtype == np.float16
    pooled_ND = tokens_NTD.astype(np.float32).mean(axis=1)
    np.testing.assert_allclose(back(tokens_NTD).mean(axis=1), back(pooled_ND), atol=5e-3)


def test_the_alignment_is_for_the_features_of_the_adapted_encoder(tmp_path: Path) -> None:
    for name, seed in (("old", 0), ("new", 1)):
        train_run(tiny_config(tmp_path, name=name, seed=seed, steps=4))
    old_data, new_data = (write_pictures(tmp_path / name, 0, 24) for name in ("a", "b"))
    mix = {"train": new_data, "mix": (old_data,), "mix_shares": (0.5,)}
    run = change(tiny_config(tmp_path), data=mix)
    cfg = EvaluateConfig(checkpoint=str(tmp_path / "old"), data="", test="")
    found, fitted = compare(cfg, str(tmp_path / "new"), run, [], Console(file=io.StringIO()))
    assert found.keys() == {"drift"}
    assert fitted is not None
    (tmp_path / "map.safetensors").write_bytes(alignment_bytes(*fitted))
    stored = load_alignment(str(tmp_path / "map.safetensors"))
    assert (stored.origin.how, stored.origin.name) == ("paired", "new")
    assert stored.origin.samples == {"old": 24}
    adapted_one, old_one = (load_subject(str(tmp_path / name)) for name in ("new", "old"))
    stored.check(adapted_one.encoder, adapted_one.preprocessing)
    with pytest.raises(ValueError, match="weights"):
        stored.check(old_one.encoder, old_one.preprocessing)


# Live sets


def test_a_run_reads_what_a_live_set_had_when_it_began(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "live", 0, 200)  # three shards
    whole = dataclasses.replace(read_manifest(data), live={"open": True})
    write_manifest(data, whole.up_to(1))
    cfg = change(tiny_config(tmp_path, name="run"), data={"train": data})
    began = complete(cfg, f"{tmp_path}/run").cfg
    assert began.data.published == (1,)
    train_run(began)
    identity = identity_of([one.manifest for one in training_sets(began)])
    write_manifest(data, whole)  # it grows
    resumed = complete(cfg, f"{tmp_path}/run").cfg
    assert resumed == began
    assert identity_of([one.manifest for one in training_sets(resumed)]) == identity
    assert training_sets(resumed)[0].manifest.num_samples == 70
    assert complete(cfg, f"{tmp_path}/another").cfg.data.published == (3,)
    write_manifest(data, dataclasses.replace(whole, live=None))
    assert complete(cfg, f"{tmp_path}/another").cfg.data == cfg.data
    with pytest.raises(ValueError, match=r"--data\.published: needs 1 numbers"):
        DataConfig(published=(1, 2))


def test_the_checkpoints_of_a_run_are_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On S3 every look is a listing; both the live set and the fit have to be taken over."""
    data = write_pictures(tmp_path / "live", 0, 100)
    write_manifest(data, dataclasses.replace(read_manifest(data), live={"open": True}))
    cfg = change(tiny_config(tmp_path, name="run"), data={"train": data}, model={"fit": None})
    train_run(change(cfg, data={"published": (2,)}, model={"fit": "pad"}))
    looks, find = [], launch.find_start
    monkeypatch.setattr(launch, "find_start", lambda *given: looks.append(given) or find(*given))
    found = complete(cfg, f"{tmp_path}/run")
    assert (found.cfg.data.published, found.cfg.model.fit) == ((2,), "pad")
    assert found.start.name is not None
    assert len(looks) == 1


# The whole job


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.ray
def test_adapts_and_tells_what_the_old_task_lost(
    cifar_shards: tuple[str, str], tmp_path: Path
) -> None:
    train, test = cifar_shards
    base: PretrainConfig = tiny_config(tmp_path, name="old")
    train_run(change(base, data={"train": train}))
    before = _digest(tmp_path / "old")
    new = write_pictures(tmp_path / "new", 500, 80)
    probes = ("--probe.train", train, "--probe.test", test, "--probe.limit", "128")
    flags = ("--from", tmp_path / "old", "--data.train", new, *probes, "--run.log-samples")
    cfg, old, run = parse([str(flag) for flag in flags])
    said = io.StringIO()
    results = adapt(cfg, old, run, console=Console(file=said, width=200))

    assert _digest(tmp_path / "old") == before
    folder = tmp_path / "old-adapted"
    assert json.loads((folder / "adapt.json").read_text()) == results
    assert "adapted encoder, probes of the old one" in (folder / "adapt.html").read_text()
    assert "starting from the weights of" in said.getvalue()
    rows = results["probes"]["old_footage"]
    assert rows.keys() == {"old", "adapted", "aligned", "refitted", "random"}
    stored = load_alignment(str(folder / "alignment.safetensors"))
    assert (stored.origin.how, stored.origin.name) == ("paired", "old-adapted")
    assert all(0 <= rows[row][probe] <= 1 for row in rows for probe in ("knn", "linear"))
    # Three steps at a fifth of the rate move the features of this hardly trained encoder a little.
    assert 0.3 < results["drift"]["old_footage"]["cosine"] < 1
    _, config, info = load_encoder(str(folder))
    assert (info["step"], config.data.mix) == (3, (train,))
    _check_mix(folder, new, train)


def _check_mix(folder: Path, new: str, old: str) -> None:
    (lines,) = [path.read_text().splitlines() for path in folder.glob("samples-*.jsonl")]
    assert len(lines) == 3
    ids = {uri: {i.hex() for i in read_rows(uri)["sample_id"].to_pylist()} for uri in (new, old)}
    for line in lines:
        seen = json.loads(line)["ids"]
        assert [sum(i in ids[uri] for i in seen) for uri in (new, old)] == [4, 4]
