"""Sizes and regions as they are written on command lines, in TOML files and in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import tyro

from helpers.pipelines.refusals import Told, teller
from models.image_size import ImageSize
from models.media.regions import Region
from pipelines.config.as_json import from_json, to_json
from pipelines.config.input_flags import WAY_OUT, read_regions
from pipelines.config.jobs import EmbedConfig, EvaluateConfig, ExportConfig
from pipelines.config.train import ModelConfig, PretrainConfig

BAR: Region = (0.0, 0.0, 1.0, 0.1)
BOX: Region = (0.25, 0.5, 0.75, 1.0)
SETS = """
bar = [[0.0, 0.0, 1.0, 0.1]]
both = [[0, 0, 1, 0.1], [0.25, 0.5, 0.75, 1]]
nothing = []
short = [[0.0, 0.0, 1.0]]
outside = [[0.0, 0.0, 1.0, 1.1]]
number = 3
words = [["left", "top", "right", "bottom"]]
"""


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    path = tmp_path / "huds.toml"
    path.write_text(SETS)
    return path


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    return teller(monkeypatch, capsys)


def regions(*texts: str) -> tuple[Region, ...]:
    """The regions of a whole command line."""
    cfg = tyro.cli(PretrainConfig, args=["--model.exclude", *texts] if texts else [])
    return cfg.model.exclude


def test_regions_are_written_as_numbers_sets_or_none(sets: Path) -> None:
    assert regions() == ()
    assert regions("none") == ()
    assert regions("0,0,1,0.1") == (BAR,)
    assert regions("0,0,1,0.1", "0.25,0.5,0.75,1") == (BAR, BOX)
    assert regions(f"{sets}:bar") == (BAR,)
    assert regions(f"{sets}:both") == (BAR, BOX)
    assert regions(f"{sets}:nothing") == ()
    assert regions("0.25,0.5,0.75,1", f"{sets}:bar") == (BOX, BAR)


def test_a_file_of_sets_may_lie_anywhere(sets: Path) -> None:
    with fsspec.open("memory://games/huds.toml", "w") as file:
        file.write(SETS)
    assert read_regions(["memory://games/huds.toml:bar"]) == (BAR,)
    colon = sets.with_name("a:b.toml")
    sets.rename(colon)
    assert read_regions([f"{colon}:bar"]) == (BAR,)


@pytest.mark.parametrize("config", [EmbedConfig, EvaluateConfig, ExportConfig])
def test_without_the_flag_the_encoders_own_regions_hold(config: Any) -> None:
    places = {"embed": ("artifact", "data", "out"), "evaluate": ("checkpoint", "data", "test")}
    names = places.get(config.__name__.removesuffix("Config").lower(), ("checkpoint", "out"))
    args = [part for name in names for part in (f"--{name}", "x")]
    assert tyro.cli(config, args=args).exclude is None
    assert tyro.cli(config, args=[*args, "--exclude", "none"]).exclude == ()
    assert tyro.cli(config, args=[*args, "--exclude", "0,0,1,0.1"]).exclude == (BAR,)


@pytest.mark.parametrize(
    ("text", "size"), [("224", 224), ("144x256", (144, 256)), ("64X64", 64), (" 32 ", 32)]
)
def test_sizes_are_one_number_or_height_by_width(text: str, size: ImageSize) -> None:
    cfg = tyro.cli(PretrainConfig, args=["--model.image-size", text])
    assert cfg.model.image_size == size
    local = tyro.cli(PretrainConfig, args=["--views.local-size", text]).views.local_size
    assert local == size
    assert tyro.cli(PretrainConfig, args=["--views.local-size", "None"]).views.local_size is None


@pytest.mark.parametrize(
    ("exclude", "size"), [((), 224), ((BAR,), (144, 256)), ((BAR, BOX), (32, 64))]
)
def test_json_and_help_say_again_what_was_given(exclude: Any, size: Any, tmp_path: Path) -> None:
    cfg = PretrainConfig(model=ModelConfig(exclude=exclude, image_size=size))
    assert from_json(PretrainConfig, to_json(cfg)) == cfg
    # A configuration as the default of flags, as adapt has it, stays as it is.
    assert tyro.cli(PretrainConfig, args=[], default=cfg) == cfg


REFUSED = [
    ("0,0,1", "'0,0,1' is neither a region nor FILE:SET"),
    ("hud", "'hud' is neither a region nor FILE:SET"),
    ("0,0,a,1", "'0,0,a,1': LEFT,TOP,RIGHT,BOTTOM are four numbers"),
    ("0,0,1,1.1", "region 0,0,1,1.1 is not LEFT,TOP,RIGHT,BOTTOM with"),
    ("0.5,0,0.5,1", "region 0.5,0,0.5,1 is not"),
    ("nan,0,1,1", "region nan,0,1,1 is not"),
    ("{folder}/no.toml:hud", "no.toml: there is no such file"),
    ("{folder}:hud", "cannot be read (Is a directory)"),
    ("{sets}:hud", "has no set 'hud'; it has bar, both, nothing, short"),
    ("{sets}:short", "set 'short' must be a list of [LEFT, TOP, RIGHT, BOTTOM]"),
    ("{sets}:outside", "set 'outside' must be"),
    ("{sets}:number", "set 'number' must be"),
    ("{sets}:words", "set 'words' must be"),
    ("{text}:bar", "is not TOML"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_wrong_region_is_told_with_flag_value_and_way_out(
    text: str, message: str, told: Told, sets: Path
) -> None:
    broken = sets.with_name("broken.toml")
    broken.write_text("bar = [[")
    value = text.format(folder=sets.parent, sets=sets, text=broken)
    said = told(
        *("embed", "--artifact", "a", "--data", "b", "--out", "c", "--exclude", "0,0,1,0.1", value)
    )
    first, *_, last = said.splitlines()
    assert first.startswith("error: --exclude: ")
    assert message in first
    assert last == WAY_OUT


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["evaluate", "--checkpoint", "a", "--data", "b", "--test", "c"], "--exclude"),
        (["export", "--checkpoint", "a", "--out", "b"], "--exclude"),
        (["pretrain", "debug"], "--model.exclude"),
        (["sweep", "debug", "--space", "optim.lr=1,2"], "--model.exclude"),
    ],
)
def test_every_flag_of_regions_names_itself(command: list[str], flag: str, told: Told) -> None:
    said = told(*command, flag, "0,0,1")
    assert said == f"error: {flag}: '0,0,1' is neither a region nor FILE:SET\n{WAY_OUT}"
    assert f"{flag}: needs regions, or none" in told(*command, flag)


@pytest.mark.parametrize("flag", ["--model.image-size", "--views.local-size"])
def test_a_wrong_size_is_told_with_its_flag(flag: str, told: Told) -> None:
    said = told("pretrain", "debug", flag, "12x")
    assert said == f"error: {flag}: '12x' is neither a number of pixels nor HEIGHTxWIDTH"
