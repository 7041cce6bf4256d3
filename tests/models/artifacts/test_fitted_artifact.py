"""Artifacts of rectangular encoders and of every fit, read by us, by timm and by transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from models.artifacts.artifact import load_artifact, save_artifact
from models.artifacts.formats import rayjepa
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.fit import Fit
from models.media.preprocessing import Preprocessing, eval_transform, normalize

PREP = Preprocessing(image_size=(32, 56), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
REGION = (0.0, 0.0, 1.0, 0.1)


def encoder_of(**shape: object) -> VisionTransformer:
    torch.manual_seed(0)
    default = {"image_size": (32, 56), "patch_size": 8, "width": 48, "depth": 2, "heads": 2}
    encoder = VisionTransformer(EncoderShape(**{**default, "patch_std": 0.14, **shape}))
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return encoder.eval()


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "whole"])
def test_fit_and_regions_come_back(tmp_path: Path, fit: Fit) -> None:
    prep = dataclasses.replace(PREP, fit=fit, exclude=(REGION,))
    save_artifact(tmp_path / "a", encoder_of(), prep, {})
    loaded = load_artifact(tmp_path / "a")
    assert loaded.preprocessing == dataclasses.replace(prep, patch_size=8)
    section = json.loads((tmp_path / "a" / "config.json").read_text())["rayjepa"]
    assert section["schema_version"] == 3
    assert section["encoder"]["image_size"] == [32, 56]
    assert section["preprocessing"]["fit"] == fit
    assert section["preprocessing"]["exclude"] == [list(REGION)]


@pytest.mark.parametrize(
    ("fit", "frames", "stored"),
    [
        ("squash", 1, {"exclude": []}),
        ("squash", 4, {"exclude": [(0.0, 0.9, 1.0, 1.0)]}),
        ("whole", 1, {"fit": "squash"}),
    ],
)
def test_an_artifact_that_would_leave_out_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: Fit, frames: int, stored: dict[str, Any]
) -> None:
    """On the whole grid its features are those of the encoder."""
    prep = dataclasses.replace(PREP, fit=fit, exclude=() if fit == "whole" else (REGION,))
    write = rayjepa.stored_preprocessing
    monkeypatch.setattr(rayjepa, "stored_preprocessing", lambda prep: write(prep) | stored)
    with pytest.raises(RuntimeError, match="other features"):
        save_artifact(tmp_path / "a", encoder_of(frames=frames, tubelet=frames // 2 or 1), prep, {})
    assert list(tmp_path.iterdir()) == []


def test_regions_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    prep = dataclasses.replace(PREP, fit="squash", exclude=((0.0, 0.0, 1.0, 1.0),))
    with pytest.raises(ValueError, match="leave nothing of a picture"):
        save_artifact(tmp_path / "a", encoder_of(), prep, {})


def test_another_patch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in patch size: 16 and 8"):
        save_artifact(tmp_path / "a", encoder_of(), dataclasses.replace(PREP, patch_size=16), {})


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(70, 100), (90, 60)], ids=["wide", "high"])
def test_timm_computes_the_same_of_a_picture(
    tmp_path: Path, fit: Fit, size: tuple[int, int]
) -> None:
    prep = dataclasses.replace(PREP, fit=fit)
    encoder = encoder_of()
    assert save_artifact(tmp_path / "a", encoder, prep, {}) == (
        [] if fit == "squash" else _without_processor(fit)
    )
    model = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = picture(*size)
    ours = torch.from_numpy(eval_transform(image, prep).copy()).permute(2, 0, 1)[None]
    ours = normalize(ours, prep.mean, prep.std)
    theirs = transform(image)[None]
    assert theirs.shape == ours.shape == (1, 3, 32, 56)
    # timm rounds the resized size to whole pixels, and then crops or pads whole pixels.
    share = ((theirs - ours).abs() > 0.35).float().mean()
    assert share < (0.06 if fit != "squash" else 1e-9)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.forward_features(ours), encoder(ours), atol=1e-4, rtol=1e-4
        )


def _without_processor(fit: Fit) -> list[str]:
    why = {
        "crop": "no processor of transformers crops pictures of any aspect to a rectangle",
        "pad": "no processor of transformers does what fit pad does",
    }
    return [f"transformers/ has no preprocessor_config.json: {why[fit]}"]


def test_a_rectangular_timm_model_is_read(tmp_path: Path) -> None:
    save_artifact(tmp_path / "a", encoder_of(), dataclasses.replace(PREP, fit="pad"), {})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["rayjepa"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "digests.json").unlink()
    loaded = load_artifact(tmp_path / "a")
    assert loaded.encoder.image_size == loaded.preprocessing.image_size == (32, 56)
    assert loaded.preprocessing.fit == "pad"
    x = torch.randn(2, 3, 32, 56)
    assert torch.equal(loaded.encoder(x), encoder_of()(x))


def test_transformers_computes_the_same_of_a_squashed_picture(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    prep, encoder = dataclasses.replace(PREP, fit="squash"), encoder_of()
    save_artifact(tmp_path / "a", encoder, prep, {})
    folder = tmp_path / "a" / "transformers"
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.IJepaModel.from_pretrained(folder).eval()
    image = picture(70, 100)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    ours = torch.from_numpy(eval_transform(image, prep).copy()).permute(2, 0, 1)[None]
    ours = normalize(ours, prep.mean, prep.std)
    # Torch and Pillow round differently: by a level or two of 255.
    torch.testing.assert_close(pixels, ours, atol=0.05, rtol=0)
    with torch.inference_mode():
        hidden = model(pixel_values=ours).last_hidden_state
        torch.testing.assert_close(hidden, encoder(ours), atol=1e-4, rtol=1e-4)
    again = load_artifact(folder)
    assert again.preprocessing.fit == "squash"
    assert again.encoder.image_size == (32, 56)


def test_what_other_libraries_cannot_do_is_said_and_not_written(tmp_path: Path) -> None:
    prep = dataclasses.replace(PREP, fit="whole", exclude=(REGION,))
    file = "transformers/ has no preprocessor_config.json"
    assert save_artifact(tmp_path / "a", encoder_of(), prep, {}) == [
        f"{file}: no processor of transformers leaves out regions",
        "timm's transform squashes pictures to one size: it has no fit whole",
        "timm computes the tokens of all regions: it leaves none out",
    ]
    assert (tmp_path / "a" / "transformers" / "model.safetensors").exists()
    assert not (tmp_path / "a" / "transformers" / "preprocessor_config.json").exists()


def test_a_rectangular_clip_encoder_is_none_for_transformers(tmp_path: Path) -> None:
    clips = {"frames": 4, "tubelet": 2, "positions": "rope_released"}
    lines = save_artifact(tmp_path / "a", encoder_of(**clips), PREP, {})
    assert lines == ["transformers/ is not written: a VJEPA2Model takes squares, not 32x56"]
    assert not (tmp_path / "a" / "transformers").exists()
    x = torch.randn(1, 3, 4, 32, 56)
    assert torch.equal(load_artifact(tmp_path / "a").encoder(x), encoder_of(**clips)(x))
    square = dataclasses.replace(PREP, image_size=32, fit="squash")
    lines = save_artifact(tmp_path / "b", encoder_of(**clips, image_size=32), square, {})
    assert lines == []
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "b" / "transformers")
    video = torch.from_numpy(np.array(picture(70, 100))).permute(2, 0, 1).repeat(4, 1, 1, 1)
    found = processor(videos=[video], return_tensors="pt")["pixel_values_videos"][0]
    ours = torch.from_numpy(eval_transform(picture(70, 100), square).copy()).permute(2, 0, 1)
    ours = normalize(ours[None], square.mean, square.std)
    torch.testing.assert_close(found, ours.expand(4, -1, -1, -1), atol=0.05, rtol=0)
