"""Artifacts compared with timm and transformers on random weights, and reading their formats.

B images, N patches, D width.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models.artifacts.artifact import load_artifact, save_artifact
from models.artifacts.formats.transformers_ijepa import from_ijepa, to_ijepa
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer, build_encoder
from models.media.preprocessing import Preprocessing, eval_transform, normalize

PREP = Preprocessing(
    image_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear"
)
PROVENANCE = {"run": "r", "step": 7, "manifest_hash": "abc"}
TOLERANCE = 1e-4


def _randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Makes every weight random, so that no wrong mapping can hide behind zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return module.eval()


def _encoder(**shape: object) -> VisionTransformer:
    default = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 3}
    return _randomise(VisionTransformer(EncoderShape(**{**default, **shape})))


@pytest.fixture
def images_BCHW() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "artifact", _encoder(), PREP, PROVENANCE)
    return tmp_path / "artifact"


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert a.detach().abs().max() > 0.1  # two zeros would agree too
    return float((a - b).detach().abs().max())


def test_round_trip_is_exact(artifact: Path, images_BCHW: torch.Tensor) -> None:
    loaded = load_artifact(artifact)
    assert loaded.preprocessing == dataclasses.replace(PREP, patch_size=8)
    assert loaded.provenance == PROVENANCE
    assert not loaded.encoder.training
    assert torch.equal(loaded.encoder(images_BCHW), _encoder()(images_BCHW))


def test_timm_loads_the_artifact_both_ways(artifact: Path, images_BCHW: torch.Tensor) -> None:
    expected = _encoder()(images_BCHW)
    config = json.loads((artifact / "config.json").read_text())
    by_folder = timm.create_model(f"local-dir:{artifact}", pretrained=True)
    by_file = timm.create_model(
        config["architecture"],
        checkpoint_path=str(artifact / "model.safetensors"),
        num_classes=0,
        **config["model_args"],
    )
    for model in (by_folder.eval(), by_file.eval()):
        assert _difference(model.forward_features(images_BCHW), expected) < TOLERANCE
        assert _difference(model(images_BCHW), expected.mean(dim=1)) < TOLERANCE
    data = timm.data.resolve_model_data_config(by_folder)
    assert data["input_size"] == (3, 32, 32)
    assert (tuple(data["mean"]), tuple(data["std"])) == (PREP.mean, PREP.std)
    assert (data["interpolation"], data["crop_pct"]) == ("bilinear", 1.0)


def test_transformers_loads_the_artifact(artifact: Path, images_BCHW: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.IJepaModel.from_pretrained(
        artifact / "transformers", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs = model(pixel_values=images_BCHW).last_hidden_state
    assert _difference(theirs, _encoder()(images_BCHW)) < TOLERANCE


def test_transformers_processor_equals_our_transform(artifact: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(artifact / "transformers")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)  # wider than high: cropped, not squashed
    theirs = processor(images=image, return_tensors="pt")["pixel_values"]
    ours = torch.from_numpy(eval_transform(image, PREP).copy()).permute(2, 0, 1)[None]
    assert _difference(theirs, normalize(ours, PREP.mean, PREP.std)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_base_patch16_gap_224", {"depth": 2}),
        ("vit_giant_patch16_gap_224", {"depth": 1}),  # MLP ratio 48 / 11
    ],
)
def test_our_encoder_equals_timms_gap_models(tmp_path: Path, name: str, shape: dict) -> None:
    """A folder and weights made by timm itself give the same features here."""
    args = {"img_size": 64, **shape}
    theirs = _randomise(timm.create_model(name, pretrained=False, num_classes=0, **args))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 0.875}
    config = {"architecture": name, "model_args": args, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_artifact(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    expected = theirs.forward_features(images)
    assert _difference(ours.encoder(images), expected) < TOLERANCE
    assert _difference(ours.encoder(images).mean(dim=1), theirs(images)) < TOLERANCE
    assert ours.preprocessing.crop_fraction == 0.875
    assert ours.preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("head", [False, True])
def test_our_encoder_equals_transformers_ijepa(
    tmp_path: Path, images_BCHW: torch.Tensor, head: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.IJepaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    kind = transformers.IJepaForImageClassification if head else transformers.IJepaModel
    theirs = _randomise(kind(config))
    theirs.save_pretrained(tmp_path)
    ours = load_artifact(tmp_path)
    backbone = theirs.ijepa if head else theirs
    expected = backbone(pixel_values=images_BCHW).last_hidden_state
    assert _difference(ours.encoder(images_BCHW), expected) < TOLERANCE
    kept_BK = torch.tensor([[0, 5, 15], [1, 2, 3]])  # ours alone computes a subset
    assert ours.encoder(images_BCHW, kept_BK).shape == (2, 3, 48)


def test_layer_norm_eps_of_a_transformers_folder_is_kept(
    tmp_path: Path, images_BCHW: torch.Tensor
) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    size = {"intermediate_size": 96, "image_size": 32, "patch_size": 8}
    theirs = _randomise(transformers.IJepaModel(transformers.IJepaConfig(**shape, **size)))
    theirs.config.layer_norm_eps = 0.5
    theirs.save_pretrained(tmp_path)
    ours = load_artifact(tmp_path)
    theirs = transformers.IJepaModel.from_pretrained(tmp_path)
    expected = theirs(pixel_values=images_BCHW).last_hidden_state
    assert _difference(ours.encoder(images_BCHW), expected) < TOLERANCE
    with pytest.raises(ValueError, match="eps"):  # timm could not express it
        save_artifact(tmp_path / "again", ours.encoder, ours.preprocessing, {})


def test_in_memory_names_of_transformers_five_map_too() -> None:
    """Both spellings, written out here, map to the same weights."""
    state = _encoder(depth=1).state_dict()
    split = to_ijepa(state)
    newer = {
        k.replace("encoder.layer.", "layers.")
        .replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj")
        .replace("intermediate.dense", "mlp.fc1")
        .replace("0.output.dense", "0.mlp.fc2"): v
        for k, v in split.items()
    }
    assert newer.keys().isdisjoint({k for k in split if "layer." in k})
    for spelling in (split, newer):
        back = from_ijepa(spelling)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[k], state[k]) for k in state)


def test_meta_checkpoint_gives_its_target_encoder(tmp_path: Path) -> None:
    target = _randomise(build_encoder("vit_ti", image_size=32, patch_size=8), seed=1)
    online = build_encoder("vit_ti", image_size=32, patch_size=8)
    checkpoint = {
        name: {f"module.{k}": v for k, v in model.state_dict().items()}
        for name, model in (("encoder", online), ("target_encoder", target))
    } | {"predictor": {}, "opt": {"state": {}}, "scaler": None, "epoch": 300, "lr": 1e-3}
    torch.save(checkpoint, tmp_path / "jepa.pth.tar")
    images = torch.randn(2, 3, 32, 32)
    loaded = load_artifact(tmp_path / "jepa.pth.tar")
    assert torch.equal(loaded.encoder(images), target(images))
    assert loaded.preprocessing.image_size == 32
    del checkpoint["encoder"], checkpoint["target_encoder"]
    torch.save(checkpoint, tmp_path / "jepa.pth.tar")
    with pytest.raises(ValueError, match="no target_encoder or encoder"):
        load_artifact(tmp_path / "jepa.pth.tar")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"encoder": partial(print, "ran")}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_artifact(tmp_path / "evil.pth")


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_an_incomplete_load_names_the_keys(artifact: Path, fault: str) -> None:
    (artifact / "digests.json").unlink()
    state = load_file(artifact / "model.safetensors")
    if fault == "missing":
        del state["blocks.1.attn.qkv.weight"]
    elif fault == "unexpected":
        state["blocks.1.attn.qkv.weight_2"] = torch.zeros(1)
    else:
        state["blocks.1.attn.qkv.weight"] = torch.zeros(3, 48)
    save_file(state, artifact / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 {fault}: blocks\.1\.attn\.qkv\.weight") as error:
        load_artifact(artifact)
    assert fault in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "args", "reason"),
    [
        ("vit_tiny_patch16_224", {}, "class and register tokens"),
        ("vit_base_patch16_siglip_gap_224", {"depth": 1, "act_layer": "gelu_tanh"}, "exact GELU"),
        ("resnet18", {}, "not a vision transformer"),
    ],
)
def test_timm_models_we_cannot_run_are_refused(
    artifact: Path, architecture: str, args: dict, reason: str
) -> None:
    (artifact / "digests.json").unlink()
    config = {"architecture": architecture, "model_args": args, "pretrained_cfg": {}}
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        load_artifact(artifact)


def test_saving_replaces_an_artifact_but_nothing_else(artifact: Path, tmp_path: Path) -> None:
    save_artifact(artifact, _encoder(depth=1), PREP, {"step": 8})
    assert load_artifact(artifact).provenance == {"step": 8}
    assert load_artifact(artifact).encoder.depth == 1
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="not replacing"):
        save_artifact(foreign, _encoder(), PREP, {})
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_size_mismatch_of_preprocessing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ in image size"):
        save_artifact(tmp_path / "a", _encoder(image_size=64), PREP, {})


def test_something_else_than_an_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing there"):
        load_artifact(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_artifact(tmp_path / "empty")
    config = json.loads((artifact / "config.json").read_text())
    config["rayjepa"]["schema_version"] = 99
    (artifact / "digests.json").unlink()
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="schema 99"):
        load_artifact(artifact)


def test_a_remote_artifact_loads(artifact: Path, images_BCHW: torch.Tensor) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(artifact), "/bucket/artifact", recursive=True)
    loaded = load_artifact("memory://bucket/artifact")
    assert torch.equal(loaded.encoder(images_BCHW), _encoder()(images_BCHW))


def test_the_folder_can_be_moved(artifact: Path, tmp_path: Path) -> None:
    shutil.move(artifact, tmp_path / "moved")
    assert load_artifact(tmp_path / "moved").provenance == PROVENANCE


def test_the_fingerprint_is_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    save_artifact(tmp_path / "one", _encoder(), PREP, PROVENANCE)
    (tmp_path / "one" / "digests.json").unlink()  # its files are changed on purpose below
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "notes.json").write_text("{}")  # nothing is read from it
    first = load_artifact(tmp_path / "one").fingerprint
    assert load_artifact(tmp_path / "two").fingerprint == first
    path = tmp_path / "two" / "model.safetensors"
    state = load_file(path)
    state["norm.bias"][0] += 1e-6
    save_file(state, path, {"format": "pt"})
    assert load_artifact(tmp_path / "two").fingerprint != first
    config = tmp_path / "one" / "config.json"
    config.write_text(config.read_text().replace('"step": 7', '"step": 8'))
    assert load_artifact(tmp_path / "one").fingerprint != first
