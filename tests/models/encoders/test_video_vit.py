"""Clips through the encoder: tubelets, positions, kept tokens, and images as one-tubelet clips.

B clips, T frames, N tokens, K kept tokens, D width, E dimensions of a head.
"""

from __future__ import annotations

import cmath
import copy
import math

import pytest
import torch
from torch import Tensor, nn

from models.encoders.positions import POSITIONS, Rope, Rotation, sincos_3d
from models.encoders.shape import PRESETS, EncoderShape, find_preset
from models.encoders.vit import PatchEmbed, VisionTransformer, build_encoder
from models.image_size import Grid

SIDE, FRAMES = 2, 8  # a grid of 4 x 2 x 2 tokens


def small(positions: str = "rope", **shape: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "width": 48, "depth": 2, "heads": 2}
    clip = {"frames": FRAMES, "tubelet": 2, "positions": positions}
    made = VisionTransformer(EncoderShape(**{**sizes, **clip, **shape}))
    with torch.no_grad():  # at the usual 0.02 attention hardly tells one place from another
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return made.eval()


def some_clips(frames: int = FRAMES) -> Tensor:
    return torch.randn(2, 3, frames, 16, 16, generator=torch.Generator().manual_seed(1))


# --- tokens ----------------------------------------------------------------------------------


def test_tubelets_times_weight_is_the_convolution() -> None:
    torch.manual_seed(0)
    embed, clips = PatchEmbed(8, 48, tubelet=2), torch.randn(2, 3, 4, 32, 32)
    convolved = embed.proj(clips).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(embed.patchify(clips)), convolved, atol=1e-5, rtol=1e-5)


def test_tokens_are_numbered_time_first_then_row_then_column() -> None:
    embed, clips = PatchEmbed(8, 48, tubelet=2), torch.zeros(1, 3, 6, 16, 32)
    clips[0, 1, 4, 9, 17] = 1.0  # third time step of three, second row of two, third column of four
    touched = embed.patchify(clips)[0].any(dim=1).nonzero().flatten()
    assert touched.tolist() == [2 * (2 * 4) + 1 * 4 + 2]


@pytest.mark.parametrize("positions", POSITIONS)
def test_kept_tokens_in_any_order_are_the_full_encoding(positions: str) -> None:
    encoder, clips = small(positions), some_clips()
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    full, shuffled = encoder(clips), encoder(clips, order)
    for b in range(2):
        torch.testing.assert_close(shuffled[b], full[b, order[b]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(shuffled[0], full[0], atol=1e-2)


@pytest.mark.parametrize("positions", POSITIONS)
def test_hidden_tubelets_do_not_matter_and_kept_ones_do(positions: str) -> None:
    encoder, clips = small(positions), some_clips()
    keep = torch.tensor([[0, 5, 10], [1, 2, 15]])
    kept = encoder(clips, keep)
    hidden = clips.clone()
    hidden[0, :, 2:4, :8, :8] = 9.0  # token 4 of the first clip
    torch.testing.assert_close(encoder(hidden, keep), kept)
    hidden[0, :, 2:4, :8, 8:] = 9.0  # token 5
    assert not torch.allclose(encoder(hidden, keep)[0], kept[0], atol=1e-2)


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_matter_along_every_axis(positions: str) -> None:
    """The same tubelet at another position gives another token."""
    encoder = small(positions)
    clips = some_clips(2).repeat(1, 1, 4, 1, 1)[..., :8, :8].repeat(1, 1, 1, 2, 2)
    clips[:, :, :2, :8, :8] *= -1  # token 0 differs, for the others to look at
    reference = encoder(clips, torch.tensor([[0, 5]]).expand(2, -1))
    for axis, moved in (("time", [0, 9]), ("row", [0, 7]), ("column", [0, 4])):
        ids = torch.tensor([moved]).expand(2, -1)
        assert not torch.allclose(encoder(clips, ids), reference, atol=1e-4), axis


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_shorter_clip_is_the_beginning_of_a_long_one(positions: str) -> None:
    encoder, clips = small(positions), some_clips()
    first = torch.arange(8).expand(2, -1)
    torch.testing.assert_close(encoder(clips[:, :, :4]), encoder(clips, first))


# --- images are one-tubelet clips ------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_image_is_a_clip_of_one_repeated_frame(positions: str) -> None:
    encoder, images = small(positions), some_clips()[:, :, 0]
    still = images[:, :, None].repeat(1, 1, 2, 1, 1)
    assert encoder(images).shape == (2, SIDE * SIDE, 48)
    torch.testing.assert_close(encoder(images), encoder(still))


@pytest.mark.parametrize("positions", POSITIONS)
def test_one_tubelet_clip_encoder_equals_image_encoder(positions: str) -> None:
    """The 2-D kernel is spread over the frames, which makes no difference for a still picture."""
    image_encoder = small(positions, frames=1, tubelet=1)
    clip_encoder = small(positions, frames=2, tubelet=2)
    state = dict(image_encoder.state_dict())
    assert state.keys() == clip_encoder.state_dict().keys()
    kernel = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = (kernel[:, :, None] / 2).repeat(1, 1, 2, 1, 1)
    clip_encoder.load_state_dict(state)
    images = some_clips()[:, :, 0]
    expected = image_encoder(images)
    torch.testing.assert_close(clip_encoder(images), expected, atol=1e-5, rtol=1e-5)
    moving = torch.stack([images, -images], dim=2)
    assert not torch.allclose(clip_encoder(moving), expected, atol=1e-2)


def test_a_grid_of_one_time_step_has_the_table_of_images() -> None:
    image_encoder = small("sincos", frames=1, tubelet=1)
    assert image_encoder.pos_embed is not None
    one_tubelet = small("sincos", frames=2, tubelet=2)
    assert torch.equal(one_tubelet.pos_embed, image_encoder.pos_embed)


# --- positions -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [24, 32, 44])  # a multiple of 6, and shares that must be cut
def test_sincos_3d_against_loops(width: int) -> None:
    tubes, rows, columns = 3, 4, 5
    half = math.ceil(width / 6)
    table = torch.zeros(tubes * rows * columns, 6 * half, dtype=torch.float64)
    for n in range(len(table)):
        places = (n // (rows * columns), n // columns % rows, n % columns)
        for axis, place in enumerate(places):
            for i in range(half):
                angle = place / 10000 ** (i / half)
                table[n, axis * 2 * half + i] = math.sin(angle)
                table[n, axis * 2 * half + half + i] = math.cos(angle)
    torch.testing.assert_close(
        sincos_3d(width, Grid(rows, columns, tubes)), table[:, :width].float()
    )


def turned(x: list[float], place: tuple[int, int, int], layout: str) -> list[float]:
    """Rotates the vector of one head at one position, by the definition, one pair at a time."""
    share = 2 * (len(x) // 3 // 2)
    out = list(x)
    for axis in range(3):
        for pair in range(share // 2):
            at = axis * share + 2 * pair
            if layout == "rope":  # a rotation of the plane: a complex factor of length one
                angle = place[axis] * 10000 ** (-pair / (share // 2))
                both = complex(x[at], x[at + 1]) * cmath.exp(1j * angle)
                out[at], out[at + 1] = both.real, both.imag
            else:  # the two dimensions of a pair take the angles of two different frequencies
                angles = [
                    place[axis] * 10000 ** (-((2 * pair + k) % (share // 2)) / (share // 2))
                    for k in (0, 1)
                ]
                out[at] = x[at] * math.cos(angles[0]) - x[at + 1] * math.sin(angles[0])
                out[at + 1] = x[at + 1] * math.cos(angles[1]) + x[at] * math.sin(angles[1])
    return out


@pytest.mark.parametrize("layout", POSITIONS[1:])
@pytest.mark.parametrize("head_dim", [24, 32])  # all dimensions turn; two stay
def test_rotation_against_loops(layout: str, head_dim: int) -> None:
    tubes, rows, columns = 3, 4, 6
    rope = Rope(head_dim, Grid(rows, columns, tubes), layout)
    x_BHKE = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(0))
    ids_BK = torch.randint(
        0, tubes * rows * columns, (2, 5), generator=torch.Generator().manual_seed(1)
    )
    out = rope(ids_BK)(x_BHKE)
    for b, h, k in ((0, 0, 0), (0, 2, 4), (1, 1, 2), (1, 2, 3)):
        n = int(ids_BK[b, k])
        place = (n // (rows * columns), n // columns % rows, n % columns)
        expected = torch.tensor(turned(x_BHKE[b, h, k].tolist(), place, layout))
        torch.testing.assert_close(out[b, h, k], expected, atol=1e-5, rtol=1e-5)


def scores(rotation: Rotation, query: Tensor, key: Tensor) -> Tensor:
    q, k = (rotation(x.expand(1, 1, 2, -1)) for x in (query, key))
    return (q[0, 0, 0] * k[0, 0, 1]).sum()


def test_scores_depend_on_displacements_alone_only_in_the_correct_layout() -> None:
    """Two tokens that move together keep their score, but not in the released layout."""
    side, tubes = 6, 4
    shift = side * side + side + 1  # one step along every axis
    query, key = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    here = torch.tensor([[0, 2 * side * side + side + 3]])
    change = {}
    for layout in POSITIONS[1:]:
        rope = Rope(48, Grid(side, side, tubes), layout)
        change[layout] = abs(
            scores(rope(here), query, key) - scores(rope(here + shift), query, key)
        )
    assert change["rope"] < 1e-4
    assert change["rope_released"] > 1e-1


def test_rotary_tables_are_built_once_and_not_saved() -> None:
    encoder = small("rope")
    assert encoder.rope is not None
    before = encoder.rope.cos_NE.data_ptr()
    encoder(some_clips())
    assert encoder.rope.cos_NE.data_ptr() == before
    assert encoder.rope.cos_NE.dtype == torch.float32
    assert not [k for k in encoder.state_dict() if "rope" in k or "pos_embed" in k]


# --- precision and memory --------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_autocast_keeps_the_residual_stream_in_fp32(positions: str) -> None:
    encoder, seen = small(positions), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(some_clips())
    assert seen == [torch.float32] * 2
    assert (out - encoder(some_clips())).abs().max() < 0.2


@pytest.mark.parametrize("positions", POSITIONS)
def test_weights_in_bf16_run(positions: str) -> None:
    """The endpoint serves weights in bf16."""
    encoder, clips = small(positions), some_clips()
    expected = encoder(clips)
    narrow = encoder.to(torch.bfloat16)(clips.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(narrow.float(), expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("positions", POSITIONS)
def test_activation_checkpointing_changes_no_number(positions: str) -> None:
    plain = small(positions)
    again = copy.deepcopy(plain)
    again.activation_checkpointing = True
    keep = torch.tensor([[0, 5, 10], [1, 2, 15]])
    runs = []
    for encoder in (plain, again):
        counts = [0]

        def count(*_: object, counts: list[int] = counts) -> None:
            counts[0] += 1

        encoder.blocks[0].register_forward_pre_hook(count)
        loss = encoder(some_clips(), keep).square().mean()
        loss.backward()
        grads = {k: p.grad for k, p in encoder.named_parameters() if p.grad is not None}
        runs.append((loss, grads, counts[0]))
    (loss, grads, once), (loss_2, grads_2, twice) = runs
    assert (once, twice) == (1, 2)
    assert torch.equal(loss, loss_2)
    assert grads.keys() == grads_2.keys()
    assert all(torch.equal(grads[k], grads_2[k]) for k in grads)


# --- presets and refusals --------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("video_")])
@pytest.mark.parametrize("positions", POSITIONS)
def test_video_presets_fit_together(name: str, positions: str) -> None:
    sizes = {"image_size": 64, "patch_size": 16, "frames": 4, "tubelet": 2}
    with torch.device("meta"):
        encoder = build_encoder(name, positions=positions, **sizes)
    out = encoder(torch.empty(1, 3, 4, 64, 64, device="meta"))
    assert out.shape == (1, 32, find_preset(name).width)


def test_the_small_presets_are_small() -> None:
    made = build_encoder("video_micro", image_size=32, patch_size=8, frames=8, tubelet=2)
    assert sum(p.numel() for p in made.parameters()) < 600_000


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"tubelet": 3}, r"--model\.tubelet"),
        ({"positions": "alibi"}, r"--model\.positions.*sincos, rope, rope_released"),
        ({"heads": 12}, "head size"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**shape)


@pytest.mark.parametrize(
    "shape", [(1, 3, 3, 16, 16), (1, 3, 10, 16, 16), (1, 1, 8, 16, 16), (1, 3, 8, 16, 24)]
)
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected clips"):
        small()(torch.zeros(shape))
