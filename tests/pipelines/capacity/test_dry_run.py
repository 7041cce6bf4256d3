"""`pretrain --dry-run`: what it prints, for every recipe, without data and without Ray."""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import pytest
import torch

from helpers.pipelines.fake_training import change
from helpers.pipelines.refusals import Told, teller
from helpers.repository import ROOT
from pipelines.capacity import dry_run as module
from pipelines.capacity.dry_run import devices_for, dry_run, matmul_rate
from pipelines.capacity.step_cost import count_step
from pipelines.config.jobs import DryRunConfig
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import new_objective

NUMBER = r"([\d,.]+(?:e[+-]\d+)?)"
short_step = functools.cache(functools.partial(count_step, depth=2))


def number(pattern: str, lines: list[str]) -> float:
    """The number that stands at `#` in one of the lines."""
    found = re.search(re.escape(pattern).replace(r"\#", NUMBER), "\n".join(lines))
    assert found, (pattern, lines)
    return float(found[1].rstrip(".,").replace(",", ""))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_one(name: str, parallel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two blocks of every network; its backward pass waits for no value either."""
    monkeypatch.setattr(module, "count_step", lambda cfg: short_step(RECIPES[name][1]))
    monkeypatch.setattr(module, "matmul_rate", lambda cfg, threads: 1e11)
    cfg = change(RECIPES[name][1], run={"parallel": parallel})
    lines = dry_run(cfg, DryRunConfig(dry_run=True))
    one = "image" if cfg.modality == "image" else "clip"
    assert f"{cfg.data.batch_size:,} {one}s on " in lines[0]
    assert f"({parallel}, {cfg.run.precision})" in lines[0]
    assert number("memory: # GiB a worker", lines) > 0
    assert sum(f"{one}s/s" in line for line in lines) == (6 if cfg.run.gpu else 1)


def test_its_numbers_are_those_of_the_run() -> None:
    cfg = change(RECIPES["cifar10_demo"][1], run={"gpu": True, "precision": "bf16"})
    lines = dry_run(cfg, DryRunConfig(dry_run=True, accelerator="H100", mfu=0.25))
    real = new_objective(cfg)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    target = sum(p.numel() for p in real.parameters() if not p.requires_grad)
    assert number("parameters: # M trained", lines) == round(trained / 1e6, 2)
    assert number("and # M of the target encoder", lines) == round(target / 1e6, 2)
    flops = number("FLOPs: # G a step", lines)
    each = number("G a step, # G of each image", lines)
    assert flops == pytest.approx(each * cfg.data.batch_size, rel=0.01)
    speed, seconds = number("H100 80GB: # images/s", lines), number("images/s, # s a step", lines)
    assert speed * flops * 1e9 / cfg.data.batch_size == pytest.approx(0.25 * 989e12, rel=0.01)
    assert speed * seconds == pytest.approx(cfg.data.batch_size, rel=0.01)


@pytest.fixture
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """How the workers share a model changes nothing of what a sample needs."""
    monkeypatch.setattr(module, "count_step", lambda cfg: short_step(RECIPES["ijepa_vits16"][1]))


@pytest.mark.usefixtures("counted_once")
def test_sharing_the_model_divides_its_memory() -> None:
    cfg = RECIPES["ijepa_vits16"][1]
    how = DryRunConfig(dry_run=True, accelerator="A100")
    whole = dry_run(cfg, how)
    parts = dry_run(change(cfg, run={"parallel": "fsdp"}), how)
    # Rounded to two digits.
    assert number("(weights #", whole) / number("(weights #", parts) == pytest.approx(8, rel=0.15)
    assert "of 8 that share the model" in "\n".join(parts)


@pytest.mark.usefixtures("counted_once")
def test_a_run_that_does_not_fit_is_told() -> None:
    more = {"batch_size": 65536, "lanes": 1}
    cfg = change(RECIPES["ijepa_vits16"][1], run={"workers": 1}, data=more)
    how = DryRunConfig(dry_run=True, accelerator="L4")
    assert "does not fit in 22 GiB" in dry_run(cfg, how)[-1]
    assert "; fits in 22 GiB" in dry_run(RECIPES["ijepa_vits16"][1], how)[-1]


def test_the_rate_of_matrix_products_is_a_rate() -> None:
    cfg, threads = RECIPES["debug"][1], torch.get_num_threads()
    assert 1e8 < matmul_rate(cfg, 1) < 1e13
    assert torch.get_num_threads() == threads
    (device,) = devices_for(change(cfg, run={"threads": 1}), None)
    assert "threads: 1" in device.name


def test_no_data_is_read_and_no_ray_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['pretrain', 'debug', '--dry-run', '--data.train', 's3://none/x'];"
        "from pipelines.pretrain import main; main(); assert 'ray' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("debug: a step is 32 images on 1 worker")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return teller(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["debug", "--dry-run", "--accelerator", "H100"], ("--accelerator H100", "--run.gpu")),
        (["cifar10_vits", "--dry-run", "--accelerator", "H9"], ("--accelerator", "H9", "A100-80")),
        (["cifar10_vits", "--dry-run", "--mfu", "40"], ("--mfu", "40")),
        (["cifar10_vits", "--accelerator", "H100"], ("--accelerator", "--dry-run")),
        (["debug", "--dry-run", "--model.encoder", "vit_x"], ("--model.encoder", "vit_x")),
    ],
)
def test_what_it_refuses(told: Told, line: list[str], words: tuple[str, ...]) -> None:
    text = told("pretrain", *line)
    assert all(word in text for word in words), text
