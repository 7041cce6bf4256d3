"""Sharded training equals training with the whole model in one process, and so do its checkpoints.

The runs are made by `helpers.pipelines.sharded_runs`, in forks outside of pytest.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from helpers.pipelines.fake_training import assert_bitwise, change, tiny_config
from helpers.pipelines.sharded_runs import CASES, HALF, NANO, OTHERS, STEPS, make_runs
from models.encoders.shape import PRESETS
from models.tensor_rows import Piece, join, load_pieces, parse_offsets, save_pieces
from pipelines.config.train import PretrainConfig
from pipelines.runs.checkpoint_format import read_state
from pipelines.runs.checkpoints import CheckpointError, load_encoder, load_tensors
from pipelines.runs.integrity import find_fault, read_shapes
from pipelines.training import parallel
from pipelines.training.contract import Worker

TOLERANCE = 1e-5
METRICS = ("loss", "grad_norm", "rankme", "knn")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_runs(folder)
    return folder


def checkpoint(runs: Path, name: str, step: int = STEPS) -> Path:
    return runs / name / f"checkpoint_{step:08d}"


def weights(folder: Path) -> dict[str, Tensor]:
    """Weights and optimizer state, as one process reads them."""
    count = read_state(folder).world_size
    return load_tensors(folder, "model", count) | load_tensors(folder, "optimizer", count)


def distance(ours: Path, theirs: Path) -> float:
    """The largest difference of a tensor, relative to its largest entry or to 1."""
    mine, reference = weights(ours), weights(theirs)
    assert mine.keys() == reference.keys()
    assert all(mine[name].shape == reference[name].shape for name in mine)
    return max(
        float((mine[n].double() - reference[n].double()).abs().max())
        / max(1.0, float(reference[n].abs().max()))
        for n in mine
        if mine[n].numel()
    )


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *((f"{case}-fsdp-2", f"{case}-ddp-1") for case in CASES),
        ("ijepa.alone-fsdp-1", "ijepa-ddp-1"),
        ("ijepa-hsdp-4", "ijepa-ddp-1"),
        ("ijepa.parts-hsdp-4", "ijepa.parts-ddp-1"),
        ("lejepa-fsdp-4", "lejepa-ddp-1"),
    ],
)
def test_twenty_sharded_steps_equal_those_of_one_process(
    runs: Path, name: str, reference: str
) -> None:
    ours, theirs = checkpoint(runs, name), checkpoint(runs, reference)
    assert distance(ours, theirs) < TOLERANCE
    mine, its = read_state(ours).metrics, read_state(theirs).metrics
    for name in METRICS:
        if name in mine:  # one row a process, as in `parts`, has no rank
            assert mine[name] == pytest.approx(its[name], rel=TOLERANCE), name
    assert mine["knn"] > 0  # the probe saw a whole encoder


@pytest.mark.parametrize("name", ["ijepa.bad_ema-fsdp-2", "ijepa.bad_norm-fsdp-2"])
def test_a_wrong_ema_and_a_norm_of_shards_would_be_noticed(runs: Path, name: str) -> None:
    ours, theirs = checkpoint(runs, name), checkpoint(runs, "ijepa-ddp-1")
    assert distance(ours, theirs) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "name", ["ijepa.other-fsdp-2", "ijepa.other-ddp-2", "ijepa.other-ddp-1", "ijepa.whole-fsdp-2"]
)
def test_another_number_of_workers_goes_on_sharded_or_whole(runs: Path, name: str) -> None:
    """The first half was trained by 4 workers of hsdp, or by 1 with the whole model."""
    assert distance(checkpoint(runs, name), checkpoint(runs, "ijepa-ddp-1")) < TOLERANCE


def test_a_sharded_run_resumes_bit_for_bit(runs: Path) -> None:
    ours, theirs = (
        ({"all": weights(checkpoint(runs, name))}, None)
        for name in ("ijepa.resumed-fsdp-2", "ijepa-fsdp-2")
    )
    assert_bitwise(ours, theirs)


@pytest.mark.slow
def test_every_objective_is_the_same_under_ddp_and_sharded(tmp_path: Path) -> None:
    make_runs(tmp_path, "every")
    for case in CASES | OTHERS:
        reference = checkpoint(tmp_path, f"{case}.every-ddp-4")
        ours = checkpoint(tmp_path, f"{case}.every-fsdp-4")
        assert distance(ours, reference) < TOLERANCE, case


# The files.


def test_every_process_writes_its_rows_and_hosts_share_the_work(runs: Path) -> None:
    folder = checkpoint(runs, "ijepa-hsdp-4")
    name = "encoder.blocks.0.mlp.fc1.weight"
    held = [load_pieces(folder / f"model-{r:05d}-of-00004.safetensors").get(name) for r in range(4)]
    assert [piece and (piece.first, len(piece.rows)) for piece in held] == [
        (0, 96),
        (96, 96),
        None,  # the second host holds the same rows
        None,
    ]
    assert find_fault(str(folder)) is None
    assert read_shapes(str(folder))[name] == (192, 48)
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}


def test_one_process_reads_the_encoder_of_a_sharded_run(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As evaluate, export and embed do."""
    monkeypatch.setitem(PRESETS, "nano", NANO)
    encoder, _, info = load_encoder(str(checkpoint(runs, "lejepa-fsdp-4")))
    reference, _, _ = load_encoder(str(checkpoint(runs, "lejepa-ddp-1")))
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), reference(image), rtol=1e-4, atol=1e-5)
    assert info["world_size"] == 4


def test_the_reader_of_torch_reads_the_files(runs: Path) -> None:
    folder = checkpoint(runs, "lejepa-fsdp-4", HALF)
    ours = load_tensors(folder, "model", 4)
    theirs = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    load(theirs, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_share_that_is_missing_or_from_another_checkpoint_is_found(
    runs: Path, tmp_path: Path
) -> None:
    folder = checkpoint(runs, "ijepa-fsdp-2")
    part = "model-00001-of-00002.safetensors"
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / part).unlink()
    assert find_fault(str(tmp_path)) == f"{part} is missing"
    with pytest.raises(CheckpointError, match=part):
        load_tensors(tmp_path, "model", 2)


def test_rows_come_back_in_any_order_and_gaps_are_refused(tmp_path: Path) -> None:
    whole = torch.arange(14.0).view(7, 2)
    save_pieces(
        {"a": Piece(whole[4:], 4, (7, 2)), "b": Piece(torch.ones(()), 0, ())}, tmp_path / "x"
    )
    save_pieces({"a": Piece(whole[:4], 0, (7, 2))}, tmp_path / "y")
    late, early = load_pieces(tmp_path / "x"), load_pieces(tmp_path / "y")
    assert torch.equal(join([late["a"], early["a"]]), whole)
    assert torch.equal(join([late["b"]]), torch.ones(()))
    with pytest.raises(ValueError, match="0 of 7 rows"):
        join([late["a"]])
    with pytest.raises(ValueError, match="4 of 7 rows"):
        join([early["a"]])
    with pytest.raises(ValueError, match="offsets in its header"):
        parse_offsets({"DCP_SHARDING_INFO": '{"a": 3}'})


# Settings.


class Told(Worker):
    """A process of a group whose hosts are known."""

    def all(self, message: object) -> list[str]:
        return HOSTS


HOSTS: list[str] = []


@pytest.mark.parametrize(
    ("hosts", "shape", "lines"),
    [
        (["a", "a", "b", "b"], (2, 2), 0),
        (["a", "b", "c", "d"], (4, 1), 0),
        (["a", "a", "a", "a"], (1, 4), 0),
        (["a", "a", "a", "b"], (4,), 1),
        (["a", "b", "a", "b"], (4,), 1),
    ],
)
def test_hsdp_shards_within_hosts_if_they_form_a_rectangle(
    hosts: list[str],
    shape: tuple[int, ...],
    lines: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{__name__}.HOSTS", hosts)
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(parallel, "init_device_mesh", lambda kind, s, **_: shapes.append(s))
    said: list[str] = []
    cfg = change(tiny_config(tmp_path), data={"lanes": 4}, run={"workers": 4, "parallel": "hsdp"})
    parallel.shard_mesh(cfg, Told(world_size=4), said.append)
    assert (shapes, len(said)) == ([shape], lines)


@pytest.mark.parametrize("name", ["muon", "prodigy"])
def test_optimizers_that_need_whole_matrices_are_refused_by_name(name: str, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, parallel="fsdp")
    with pytest.raises(ValueError, match=f"--run.parallel: --optim.name {name}") as error:
        change(cfg, optim={"name": name})
    assert len(str(error.value).splitlines()) <= 3


def test_offload_is_for_sharded_models_on_gpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run.cpu-offload: needs --run.gpu"):
        tiny_config(tmp_path, parallel="fsdp", cpu_offload=True)
    assert tiny_config(tmp_path, parallel="fsdp", cpu_offload=True, gpu=True).run.cpu_offload
    assert PretrainConfig().run.parallel == "ddp"
