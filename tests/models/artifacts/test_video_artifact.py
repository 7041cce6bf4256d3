"""Reading and writing `transformers.VJEPA2Model` folders, on random weights.

B clips, T frames, N tokens, K context tokens, D width.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.artifacts.artifact import load_artifact, load_predictor, load_strict, save_artifact
from models.artifacts.formats.transformers_vjepa2 import from_vjepa2, to_vjepa2
from models.encoders.predictor import Predictor
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.image_size import Grid
from models.media.preprocessing import Preprocessing, normalize

transformers = pytest.importorskip("transformers")

PREP = Preprocessing(
    image_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear"
)
TOLERANCE = 1e-4
# Heads of 16 and 20: 4 and 2 dimensions do not turn.
SHAPE = {
    "crop_size": 32,
    "patch_size": 8,
    "frames_per_clip": 8,
    "tubelet_size": 2,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 2.0,
    "pred_hidden_size": 40,
    "pred_num_hidden_layers": 2,
    "pred_num_attention_heads": 2,
    "pred_num_mask_tokens": 2,
}


def _randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Makes every weight random, so that no wrong mapping can hide behind zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if value.requires_grad:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return module.eval()


def _theirs(**changes: object) -> nn.Module:
    return _randomise(transformers.VJEPA2Model(transformers.VJEPA2Config(**SHAPE | changes)))


def _ours(positions: str = "rope_released", **shape: object) -> VisionTransformer:
    default = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 3}
    clip = {"frames": 8, "tubelet": 2, "positions": positions}
    return _randomise(VisionTransformer(EncoderShape(**{**default, **clip, **shape})))


def _our_predictor(**shape: object) -> Predictor:
    default = {"grid": Grid(4, 4, 4), "encoder_width": 48, "width": 40, "depth": 2, "heads": 2}
    released = {"positions": "rope_released", "mask_tokens": 2}
    return _randomise(Predictor(**{**default, **released, **shape}))


@pytest.fixture
def clips_BCTHW() -> Tensor:
    return torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


def _masks(context: int = 20, target: int = 30) -> tuple[Tensor, Tensor]:
    order = torch.rand(2, 64, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, :context].sort(1).values, order[:, context : context + target].sort(1).values


def _run(model: nn.Module, clips_BCTHW: Tensor, context: Tensor, target: Tensor) -> Tensor:
    clips_BTCHW = clips_BCTHW.transpose(1, 2)
    return model(clips_BTCHW, context_mask=[context], target_mask=[target])


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.detach().abs().max() > 0.1  # two zeros would agree too
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 72, "num_attention_heads": 3},  # heads of 24: all dimensions turn
        {"tubelet_size": 1, "frames_per_clip": 4},
        {"tubelet_size": 4},
    ],
)
def test_encoder_equals_transformers(
    tmp_path: Path, clips_BCTHW: Tensor, changes: dict[str, object]
) -> None:
    theirs = _theirs(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_artifact(tmp_path).encoder
    clips_BCTHW = clips_BCTHW[:, :, : ours.frames]
    expected = theirs(clips_BCTHW.transpose(1, 2), skip_predictor=True).last_hidden_state
    assert _difference(ours(clips_BCTHW), expected) < TOLERANCE


def test_predictor_equals_transformers(tmp_path: Path, clips_BCTHW: Tensor) -> None:
    theirs, (context, target) = _theirs(), _masks()
    theirs.save_pretrained(tmp_path)
    encoder, predictor = load_artifact(tmp_path).encoder, load_predictor(tmp_path)
    output = _run(theirs, clips_BCTHW, context, target)
    tokens_BND = encoder(clips_BCTHW)
    context_BKD = tokens_BND.gather(1, context[..., None].expand(-1, -1, 48))
    assert _difference(context_BKD, output.masked_hidden_state) < TOLERANCE
    expected = output.predictor_output.last_hidden_state
    # The one mask token that transformers asks with is the second.
    predicted = predictor(context_BKD, context, target[:, None], mask=1)[:, 0]
    assert _difference(predicted, expected) < TOLERANCE
    other = predictor(context_BKD, context, target[:, None], mask=0)[:, 0]
    assert _difference(other, expected) > 100 * TOLERANCE


def test_the_correct_rotary_layout_is_another_function(clips_BCTHW: Tensor) -> None:
    """Negative control: the comparison above does depend on positions."""
    theirs = _theirs()
    state, _ = from_vjepa2(theirs.state_dict())
    expected = theirs(clips_BCTHW.transpose(1, 2), skip_predictor=True).last_hidden_state
    found = {}
    for positions in ("rope", "rope_released"):
        ours = _ours(positions, depth=3, mlp_ratio=2.0)
        load_strict(ours, state, "test")
        found[positions] = _difference(ours(clips_BCTHW), expected)
    assert found["rope_released"] < TOLERANCE
    assert found["rope"] > 10 * TOLERANCE


def test_a_single_frame_is_repeated_as_transformers_does(
    tmp_path: Path, clips_BCTHW: Tensor
) -> None:
    theirs = _theirs()
    theirs.save_pretrained(tmp_path)
    images_BCHW = clips_BCTHW[:, :, 0]
    expected = theirs(images_BCHW[:, None], skip_predictor=True).last_hidden_state
    assert expected.shape[1] == 16
    assert _difference(load_artifact(tmp_path).encoder(images_BCHW), expected) < TOLERANCE


def test_classification_models_give_their_backbone(tmp_path: Path, clips_BCTHW: Tensor) -> None:
    config = transformers.VJEPA2Config(**SHAPE, num_labels=3, num_pooler_layers=1)
    theirs = _randomise(transformers.VJEPA2ForVideoClassification(config))
    theirs.save_pretrained(tmp_path)
    clips = clips_BCTHW.transpose(1, 2)
    expected = theirs.vjepa2(clips, skip_predictor=True).last_hidden_state
    assert _difference(load_artifact(tmp_path).encoder(clips_BCTHW), expected) < TOLERANCE


def test_processor_of_a_transformers_folder_is_kept(tmp_path: Path) -> None:
    _theirs().save_pretrained(tmp_path)
    transformers.VJEPA2VideoProcessor(
        crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(tmp_path)
    assert (tmp_path / "video_preprocessor_config.json").is_file()
    prep = load_artifact(tmp_path).preprocessing
    assert (prep.image_size, prep.interpolation) == (32, "bilinear")
    assert (prep.mean, prep.std) == ((0.5,) * 3, (0.25,) * 3)
    assert prep.crop_fraction == 32 / 36  # int(32 * 256 / 224)


# --- our artifact ----------------------------------------------------------------------------


def test_artifact_with_predictor_loads_in_transformers(tmp_path: Path, clips_BCTHW: Tensor) -> None:
    encoder, predictor, (context, target) = _ours(), _our_predictor(), _masks()
    save_artifact(tmp_path / "a", encoder, PREP, {"step": 7}, predictor)
    theirs, info = transformers.VJEPA2Model.from_pretrained(
        tmp_path / "a" / "transformers", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    output = _run(theirs, clips_BCTHW, context, target)
    tokens_BND = encoder(clips_BCTHW)
    assert _difference(tokens_BND, output.last_hidden_state) < TOLERANCE
    context_BKD = tokens_BND.gather(1, context[..., None].expand(-1, -1, 48))
    predicted = predictor(context_BKD, context, target[:, None], mask=1)[:, 0]
    assert _difference(predicted, output.predictor_output.last_hidden_state) < TOLERANCE
    again = load_predictor(tmp_path / "a" / "transformers").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in predictor.state_dict().items())


def test_artifact_without_predictor_loads_the_encoder(tmp_path: Path, clips_BCTHW: Tensor) -> None:
    save_artifact(tmp_path / "a", _ours(), PREP, {})
    theirs, info = transformers.VJEPA2Model.from_pretrained(
        tmp_path / "a" / "transformers", output_loading_info=True
    )
    assert all(k.startswith("predictor.") for k in info["missing_keys"])
    assert not info["unexpected_keys"]
    output = theirs(clips_BCTHW.transpose(1, 2), skip_predictor=True)
    assert _difference(_ours()(clips_BCTHW), output.last_hidden_state) < TOLERANCE
    with pytest.raises(ValueError, match="no predictor weights"):
        load_predictor(tmp_path / "a" / "transformers")
    with pytest.raises(ValueError, match="not a VJEPA2Model"):
        load_predictor(tmp_path / "a")


@pytest.mark.parametrize("positions", ["sincos", "rope", "rope_released"])
@pytest.mark.parametrize("frames", [1, 8])
def test_artifact_round_trip_is_exact(
    tmp_path: Path, clips_BCTHW: Tensor, positions: str, frames: int
) -> None:
    encoder = _ours(positions, frames=frames, tubelet=min(frames, 2))
    save_artifact(tmp_path / "a", encoder, PREP, {"step": 7})
    loaded = load_artifact(tmp_path / "a")
    assert loaded.provenance == {"step": 7}
    again = loaded.encoder
    assert (again.frames, again.positions) == (frames, positions)
    clips = clips_BCTHW[:, :, :frames]
    assert torch.equal(again(clips), encoder(clips))
    timm_loads_it = "architecture" in json.loads((tmp_path / "a" / "config.json").read_text())
    assert timm_loads_it == (frames == 1 and positions == "sincos")
    folder = tmp_path / "a" / "transformers"
    assert folder.exists() == (timm_loads_it or positions == "rope_released")


def test_transformers_processor_equals_our_normalisation(tmp_path: Path) -> None:
    save_artifact(tmp_path / "a", _ours(), PREP, {})
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "a" / "transformers")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 40, 3), dtype=np.uint8)
    clip_TCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    theirs = processor(clip_TCHW, return_tensors="pt")["pixel_values_videos"]
    centre_BCTHW = clip_TCHW[None, :, :, :, 4:36].transpose(1, 2)  # wider than high: cropped
    ours = normalize(centre_BCTHW, PREP.mean, PREP.std).transpose(1, 2)
    assert _difference(theirs, ours) < TOLERANCE


def test_names_map_there_and_back() -> None:
    for encoder in (_ours(), _ours(tubelet=1)):
        predictor = _our_predictor()
        back = from_vjepa2(to_vjepa2(encoder.state_dict(), predictor.state_dict()))
        for state, module in zip(back, (encoder, predictor), strict=True):
            assert state.keys() == module.state_dict().keys()
            assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_foreign_names_are_reported(tmp_path: Path) -> None:
    theirs = _theirs()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["registers"] = torch.zeros(1)
    del state["encoder.layer.1.attention.key.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.attn\.qkv\.bias.*registers"):
        load_artifact(tmp_path)


def test_what_we_cannot_run_is_refused(tmp_path: Path) -> None:
    theirs = _theirs(hidden_act="gelu_new")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_act gelu"):
        load_artifact(tmp_path)
    with pytest.raises(ValueError, match="differ in positions"):
        save_artifact(tmp_path / "a", _ours("rope"), PREP, {}, _our_predictor())
