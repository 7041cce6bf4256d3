"""Rectangular grids, grids that differ within a batch, and padding.

Shape legend: B clips, N tokens of a grid, K tokens, P pixel values per token, D width.
"""

from __future__ import annotations

import math

import pytest
import torch

from models.encoders.blocks import use_plain_attention
from models.encoders.kept_tokens import KeptTokens
from models.encoders.positions import Rope, fitted_places, grid_places, sincos_table, table_at
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.image_size import Grid, best_grid, parse_image_size, size_text


def encoder_of(positions: str = "sincos", tubes: int = 2, size: tuple[int, int] = (24, 40)):
    shape = EncoderShape.from_preset(
        "video_micro",
        image_size=size,
        patch_size=8,
        frames=2 * tubes,
        tubelet=2,
        positions=positions,
        patch_std=0.14,
    )
    torch.manual_seed(0)
    return VisionTransformer(shape).eval()


def test_an_encoder_reads_rows_and_columns() -> None:
    encoder = encoder_of()
    assert encoder.grid == Grid(3, 5, 2)
    clips = torch.randn(2, 3, 4, 24, 40)
    tokens = encoder(clips)
    assert tokens.shape == (2, 30, 96)
    with pytest.raises(ValueError, match=r"\[B, 3, T, 24, 40\]"):
        encoder(clips.mT)
    # A patch is read from where its row and column say.
    patches_BNP = encoder.patch_embed.patchify(clips)
    cut = clips[:, :, 2:4, 8:16, 24:32].flatten(1)
    torch.testing.assert_close(patches_BNP[:, 15 + 5 + 3], cut)


def test_a_square_given_as_a_pair_is_the_square() -> None:
    one = EncoderShape.from_preset("vit_ti", image_size=32, patch_size=8)
    assert EncoderShape.from_preset("vit_ti", image_size=(32, 32), patch_size=8) == one
    assert EncoderShape.from_preset("vit_ti", image_size=[32, 64], patch_size=8).image_size == (
        32,
        64,
    )
    with pytest.raises(ValueError, match="does not divide image size 32x60"):
        EncoderShape.from_preset("vit_ti", image_size=(32, 60), patch_size=8)


@pytest.mark.parametrize("text", ["224", "144x256"])
def test_sizes_are_read_and_written(text: str) -> None:
    assert size_text(parse_image_size(text)) == text
    assert parse_image_size("96X96") == 96


@pytest.mark.parametrize("text", ["", "x", "12x", "-3", "1.5", "12x12x12"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        parse_image_size(text)


@pytest.mark.parametrize(
    ("height", "width", "tokens", "grid"),
    [
        (1, 1, 196, (14, 14)),
        (1, 1, 60, (7, 7)),
        (9, 16, 144, (9, 16)),
        (1280, 720, 144, (16, 9)),
        (720, 1280, 32, (4, 7)),
        (3, 4, 196, (12, 16)),
        (1, 1000, 196, (1, 196)),
        (5, 4, 1, (1, 1)),
    ],
)
def test_the_best_grid_keeps_the_aspect(
    height: int, width: int, tokens: int, grid: tuple[int, int]
) -> None:
    assert best_grid(height, width, tokens) == grid


def test_grids_of_usual_pictures_use_their_tokens_and_keep_their_aspect() -> None:
    for aspect in (0.4, 9 / 16, 0.75, 1.0, 4 / 3, 16 / 9, 2.5):
        rows, columns = best_grid(aspect, 1.0, 196)
        assert 170 <= rows * columns <= 196
        assert abs(math.log(rows / columns / aspect)) < 0.08


def test_places_of_the_own_grid_are_whole_numbers() -> None:
    grid = Grid(3, 5, 2)
    ids = torch.arange(grid.tokens)[None]
    places = fitted_places(ids, torch.tensor([[3, 5]]), grid)
    torch.testing.assert_close(places[0].double(), grid_places(grid))


def test_edges_of_a_grid_meet_those_of_the_encoders() -> None:
    """The outer edge of the first patch is at -0.5 and that of the last at rows - 0.5."""
    places = fitted_places(torch.arange(12)[None], torch.tensor([[2, 6]]), Grid(4, 4))
    rows, columns = places[0, :, 1].view(2, 6), places[0, :, 2].view(2, 6)
    torch.testing.assert_close(rows[:, 0], torch.tensor([0.5, 2.5]))
    step = 4 / 6
    torch.testing.assert_close(columns[0], torch.arange(6) * step + step / 2 - 0.5)


def test_a_table_is_read_at_its_places_and_linear_between_them() -> None:
    grid = Grid(2, 3, 2)
    table = sincos_table(24, grid)
    places = grid_places(grid).float()[None]
    assert torch.equal(table_at(table, places, grid)[0], table)
    between = table_at(table, torch.tensor([[[1.0, 0.25, 1.5]]]), grid)[0, 0]
    cells = table.view(2, 2, 3, 24)[1]
    mean = cells[:, 1:].mean(1)
    torch.testing.assert_close(between, 0.75 * mean[0] + 0.25 * mean[1])
    beyond = table_at(table, torch.tensor([[[0.0, -0.4, 2.3]]]), grid)[0, 0]
    torch.testing.assert_close(beyond, table[2])


def test_rotations_of_fitted_places_are_by_the_definition() -> None:
    rope = Rope(24, Grid(4, 4), "rope")
    rotation = rope(torch.tensor([[7]]), torch.tensor([[2, 6]]))  # row 1, column 1
    angle = (1.5 * 4 / 6 - 0.5) * 10000 ** (-1 / 4)  # second frequency of the column's share
    assert math.isclose(float(rotation.cos_B1KE[0, 0, 0, 18]), math.cos(angle), abs_tol=1e-6)
    assert math.isclose(float(rotation.sin_B1KE[0, 0, 0, 4]), 0.0, abs_tol=1e-6)  # time 0
    row = float(rotation.sin_B1KE[0, 0, 0, 8])
    assert math.isclose(row, math.sin(1.5 * 4 / 2 - 0.5), abs_tol=1e-6)


@pytest.mark.parametrize("positions", ["sincos", "rope"])
@pytest.mark.parametrize("plain", [False, True])
def test_padding_changes_nothing(positions: str, plain: bool) -> None:
    """A batch of different grids and lengths gives what each clip gives alone."""
    encoder = encoder_of(positions)
    if plain:
        use_plain_attention(encoder)
    patches_BKP = torch.randn(3, 9, 384)
    ids_BK = torch.tensor([[0, 2, 3, 7, 9, 11, 12, 20, 29], [0, 1, 2, 3, 4, 5, 0, 0, 0], [5] * 9])
    grids_B2 = torch.tensor([[3, 5], [2, 7], [5, 3]])
    valid_BK = torch.arange(9) < torch.tensor([[9], [6], [1]])
    tokens = encoder.forward_tokens(patches_BKP, ids_BK, grids_B2, valid_BK)
    for b, length in enumerate((9, 6, 1)):
        alone = encoder.forward_tokens(
            patches_BKP[b : b + 1, :length], ids_BK[b : b + 1, :length], grids_B2[b : b + 1]
        )
        torch.testing.assert_close(tokens[b, :length], alone[0], atol=1e-5, rtol=1e-5)
    own = encoder.forward_tokens(patches_BKP[:1], ids_BK[:1])
    torch.testing.assert_close(tokens[:1], own, atol=1e-5, rtol=1e-5)  # the encoder's own grid
    other = encoder.forward_tokens(patches_BKP[:1], ids_BK[:1], torch.tensor([[5, 3]]))
    assert (tokens[:1] - other).abs().max() > 5e-5  # fresh weights attend almost evenly


def test_kept_tokens_stand_at_their_places() -> None:
    encoder = encoder_of()
    patches_BNP = torch.randn(2, 30, 384)
    ids_BK = torch.tensor([[1, 4, 8], [2, 0, 0]])
    kept = KeptTokens(
        torch.tensor([[3, 5], [3, 5]]), ids_BK, torch.tensor([[True] * 3, [True, False, False]])
    )
    tokens_BKD = kept.encode(encoder, patches_BNP)
    tokens_BND, pooled_BD = kept.in_grid(tokens_BKD, 30), kept.mean(tokens_BKD)
    alone = encoder.forward_tokens(patches_BNP[:1, [1, 4, 8]], ids_BK[:1])
    torch.testing.assert_close(tokens_BND[0, [1, 4, 8]], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled_BD[0], alone[0].mean(0), atol=1e-5, rtol=1e-5)
    assert tokens_BND[0].abs().sum(1).nonzero().flatten().tolist() == [1, 4, 8]
    assert tokens_BND[1].abs().sum(1).nonzero().flatten().tolist() == [2]
    torch.testing.assert_close(pooled_BD[1], tokens_BND[1, 2])
