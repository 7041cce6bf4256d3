"""Views against torch's and torchvision's own resampling and colour functions.

Shape legend: B images, C channels, H and W pixels, S pixels of a side of the view.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as reference

from models.keyed_random.tensors import bits, normals, uniforms
from models.views import _DRAWS, Views, kept_tokens, make_view, resize_matrix
from pipelines.config.views import ViewsConfig
from pipelines.loading.masks import multiblock as masking

PLAIN = {"global_scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "colour": 0.0, "grey": 0.0}


def views(size: int = 32, **settings: object) -> Views:
    return Views.of(dataclasses.asdict(ViewsConfig(**settings)), size)  # type: ignore[arg-type]


def images(count: int = 6, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(count, 3, 5, 5, generator=generator)
    grown = functional.interpolate(smooth, size=(size, size), mode="bicubic").clamp(0, 1)
    return (grown * 255).byte()


def keys(count: int = 6) -> Tensor:
    return torch.arange(count) * 7919 + 1


def drawn(count: int, **fixed: float) -> dict[str, Tensor]:
    return {name: torch.full((count,), fixed.get(name, 0.999)) for name in _DRAWS}


def test_random_numbers_equal_those_of_the_loader() -> None:
    words = np.array([0, 1, 2**63 + 5, 2**64 - 1], np.uint64)
    ours = bits(torch.from_numpy(words.view(np.int64)), 301, 9)
    assert (ours.numpy().view(np.uint64) == masking.bits(words, 301, 9)).all()
    floats = uniforms(torch.from_numpy(words.view(np.int64)), 301, 9)
    assert np.abs(floats.numpy() - masking.uniforms(words, 301, 9)).max() < 2.0**-24


def test_normals_are_normal() -> None:
    z = normals(torch.arange(2000), 5, 31).double()
    assert z.shape == (2000, 31)
    moments = [float((z**p).mean()) for p in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.06)
    assert abs(np.corrcoef(z[:, 0], z[:, 16])[0, 1]) < 0.1  # one pair of Box and Muller's


@pytest.mark.parametrize("size", [8, 16, 24, 32, 48])
def test_without_augmentation_a_view_is_the_resized_picture(size: int) -> None:
    pixels = images()
    made = views(size, **PLAIN).make(pixels, keys())
    expected = functional.interpolate(
        pixels.float() / 255, size=(size, size), mode="bilinear", antialias=True
    )
    assert len(made) == 2
    for view in made:
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_crops_show_the_pixels_in_their_box() -> None:
    line = torch.arange(20.0) + 0.5  # a ramp: linear resampling reads off the place
    matrix = resize_matrix(torch.tensor([3.25, 2.0]), torch.tensor([8.0, 15.0]), 20, 4)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 4))
    places = matrix @ line
    torch.testing.assert_close(
        places[0], 3.25 + torch.tensor([1.0, 3.0, 5.0, 7.0]), rtol=0, atol=0.2
    )
    torch.testing.assert_close(
        places[1], 2 + 3.75 * torch.tensor([0.5, 1.5, 2.5, 3.5]), rtol=0, atol=0.2
    )


def test_areas_and_places_follow_the_settings() -> None:
    from models.views import crop_boxes

    draws = dict(zip(_DRAWS, uniforms(torch.arange(5000), 301, len(_DRAWS)).unbind(1), strict=True))
    left, top, wide, high = crop_boxes(draws, 64, 64, (0.2, 0.5), (0.75, 4 / 3))
    area = wide * high / 64**2
    assert 0.2 - 1e-4 <= area.min() < 0.21
    assert 0.49 < area.max() <= 0.5 + 1e-4
    assert abs(float(area.mean()) - 0.35) < 0.005
    assert 0.75 - 1e-3 <= (wide / high).min() < (wide / high).max() <= 4 / 3 + 1e-3
    for start, length in ((left, wide), (top, high)):
        assert start.min() >= 0
        assert (start + length).max() <= 64 + 1e-3


def test_flip_and_blur() -> None:
    pixels = images()
    how = views(**PLAIN).augmentation
    plain = make_view(pixels, drawn(6), 32, (1, 1), how)
    flip = dataclasses.replace(how, flip=0.5)
    assert torch.equal(make_view(pixels, drawn(6, flip=0.4), 32, (1, 1), flip), plain.flip(-1))
    torch.testing.assert_close(make_view(pixels, drawn(6, flip=0.6), 32, (1, 1), flip), plain)
    blur = dataclasses.replace(how, blur=0.5, blur_sigma=(1.0, 1.0))
    blurred = make_view(pixels, drawn(6, blur=0.4), 32, (1, 1), blur)
    inside = (..., slice(8, -8), slice(8, -8))  # at the edge torchvision mirrors
    torch.testing.assert_close(
        blurred[inside],
        reference.gaussian_blur(plain, [15, 15], [1.0, 1.0])[inside],
        rtol=0,
        atol=1e-4,
    )
    untouched = make_view(pixels, drawn(6, blur=0.6), 32, (1, 1), blur)
    torch.testing.assert_close(untouched, plain, rtol=0, atol=1e-5)


def test_colour_changes_equal_torchvision() -> None:
    pixels = (images().float() * 0.4 + 70).byte()  # away from black and white: nothing is cut off
    how = dataclasses.replace(views(**PLAIN).augmentation, colour=0.5)
    plain = pixels.float() / 255

    def view(**draws: float) -> Tensor:
        same = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5, "colour": 0.0}
        return make_view(pixels, drawn(6, **{**same, **draws}), 32, (1, 1), how)

    def near(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)

    near(view(), plain)
    near(view(brightness=0.75), reference.adjust_brightness(plain, 1.2))
    near(view(contrast=0.0), reference.adjust_contrast(plain, 0.6))
    near(view(saturation=1.0), reference.adjust_saturation(plain, 1.2))
    near(view(brightness=0.0, colour=0.6), plain)  # the share that is left alone
    # Hue is rotated in YIQ, not in HSV: brightness is kept, and a full turn is the identity.
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    turned = view(hue=1.0)
    near((turned * luma).sum(1), (plain * luma).sum(1))
    assert (turned - plain).abs().max() > 0.02
    how = dataclasses.replace(how, grey=0.5)
    near(view(grey=0.4), reference.rgb_to_grayscale(plain, 3))
    how = dataclasses.replace(how, solarise=0.5)
    near(view(solarise=0.4), torch.where(plain >= 0.5, 1 - plain, plain))


def test_views_depend_on_the_sample_alone_and_differ_from_each_other() -> None:
    pixels, all_on = images(), views(blur=0.5, solarise=0.2, locals=2, local_size=16)
    whole = all_on.make(pixels, keys())
    assert [v.shape[-1] for v in whole] == [32, 32, 16, 16]
    order = torch.tensor([4, 1])
    some = all_on.make(pixels[order], keys()[order])
    for view, part in zip(whole, some, strict=True):
        torch.testing.assert_close(part, view[order], rtol=0, atol=1e-6)
        assert view.min() >= 0
        assert view.max() <= 1
    assert (whole[0] - whole[1]).abs().mean() > 0.02
    with torch.autocast("cpu", torch.bfloat16):
        again = all_on.make(pixels, keys())
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    other = all_on.make(pixels, keys() + 1)
    assert (whole[0] - other[0]).abs().mean() > 0.02


def test_all_frames_of_a_clip_are_treated_alike() -> None:
    pixels = images()[:, :, None].expand(-1, -1, 3, -1, -1)
    one, three = (views().make(p, keys())[0] for p in (images(), pixels))
    assert three.shape == (6, 3, 3, 32, 32)
    for frame in three.unbind(2):
        torch.testing.assert_close(frame, one, rtol=0, atol=1e-5)


def test_kept_tokens_are_random_subsets() -> None:
    ids = kept_tokens(torch.arange(4000), 0, steps=1, per_step=16, lasts=1, keep=4)
    assert (ids.diff(dim=1) > 0).all()
    shares = torch.bincount(ids.flatten(), minlength=16) / 4000
    torch.testing.assert_close(shares, torch.full((16,), 0.25), rtol=0, atol=0.03)
    assert not torch.equal(ids, kept_tokens(torch.arange(4000), 1, 1, 16, 1, 4))


def test_kept_tokens_lie_in_a_time_window() -> None:
    # Keys may be negative: the start is drawn from a signed word.
    ids = kept_tokens(torch.arange(-2000, 2000), 0, steps=5, per_step=4, lasts=2, keep=8)
    starts = ids[:, 0] // 4
    assert torch.equal(ids, 4 * starts[:, None] + torch.arange(8))  # all of two time steps
    shares = torch.bincount(starts, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.03)
    half = kept_tokens(torch.arange(4000), 0, steps=5, per_step=4, lasts=2, keep=4)
    assert (half // 4).diff(dim=1).max() <= 1
    assert (half[:, -1] // 4 - half[:, 0] // 4 <= 1).all()


def test_number_of_tokens_that_a_view_keeps() -> None:
    assert views().kept(8, 16) == (8, 128)
    assert views(token_drop=0.5, time_window=0.5).kept(8, 16) == (4, 32)
    assert views(token_drop=0.95, time_window=0.1).kept(1, 4) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"globals": 1}, "views.globals"),
        ({"hue": 0.6}, "views.hue"),
        ({"local_scale": (0.0, 0.3)}, "views.local-scale"),
        ({"token_drop": 1.0}, "views.token-drop"),
        ({"time_window": 0.0}, "views.time-window"),
    ],
)
def test_impossible_settings_name_the_flag(settings: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag}"):
        ViewsConfig(**settings)
