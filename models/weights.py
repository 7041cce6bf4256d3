"""The artifact: an encoder that timm and transformers load without this project, and back.

    DIR/model.safetensors             weights under timm's names
    DIR/config.json                   timm's hub form, plus our section `rayjepa`
    DIR/transformers/                 the same encoder for `transformers.IJepaModel`, with its
                                      config.json and preprocessor_config.json

`load_artifact` reads these folders, foreign ones in either form, and Meta's checkpoint files.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.foreign import Source, read_meta, read_state, read_timm, read_transformers
from models.key_maps import to_transformers
from models.preprocessing import RESAMPLING, Preprocessing, normalize
from models.vit import LN_EPS, VisionTransformer

SCHEMA_VERSION = 1
# timm's own names of these shapes; any other shape goes under the first with its arguments spelt
# out, which timm applies on top.
TIMM_DEFAULT = "vit_base_patch16_gap_224"
TIMM_NAMES = {
    (1280, 32, 14, 224): "vit_huge_patch14_gap_224",
    (1280, 32, 16, 448): "vit_huge_patch16_gap_448",
    (1408, 40, 16, 224): "vit_giant_patch16_gap_224",
}


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An encoder with what is needed to use it."""

    encoder: VisionTransformer
    """In eval mode, fp32, on the CPU."""
    preprocessing: Preprocessing
    config: dict[str, Any]
    """Our section of config.json: schema_version, encoder, preprocessing, pooling, provenance."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights come from: run, step, manifest_hash; or the foreign source."""
        return dict(self.config["provenance"])


def save_artifact(
    folder: Path,
    encoder: VisionTransformer,
    preprocessing: Preprocessing,
    provenance: Mapping[str, Any],
) -> None:
    """Writes the artifact, reads it back and only then publishes it.

    Args:
        folder: does not exist, is empty, or holds an earlier artifact, which is replaced.
        provenance: run, step, manifest_hash and whatever else JSON can hold.

    Raises:
        ValueError: the folder holds something else, or the encoder is not timm's plain ViT.
        RuntimeError: the artifact read back gives other features.
    """
    if encoder.norm.eps != LN_EPS:
        raise ValueError(f"timm's ViT has LayerNorm eps {LN_EPS}, this encoder {encoder.norm.eps}")
    if encoder.image_size != preprocessing.image_size:
        sizes = f"{preprocessing.image_size} and {encoder.image_size}"
        raise ValueError(f"preprocessing and encoder differ in image size: {sizes}")
    _require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "artifact"
        _write_files(new, encoder, preprocessing, provenance)
        _verify(new, encoder, preprocessing)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)


def load_artifact(uri: str | Path) -> Artifact:
    """Loads an encoder from an artifact or from other people's formats.

    Args:
        uri: local or `s3://` folder of our artifact, of a timm model without class token (such as
            `vit_huge_patch14_gap_224.in1k_ijepa`) or of a `transformers.IJepaModel`; or a released
            I-JEPA checkpoint file (`.pth.tar`).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not one of these, or weights missing, left over or of another shape, by name.
    """
    with _local(str(uri)) as path:
        if path.is_file():
            return _assemble(read_meta(path, str(uri)), str(uri))
        if not (path / "config.json").is_file():
            raise ValueError(f"{uri}: no config.json; not an artifact")
        config = json.loads((path / "config.json").read_text())
        if "rayjepa" in config:
            return _load_ours(path, config["rayjepa"], str(uri))
        if config.get("model_type") == "ijepa":
            return _assemble(read_transformers(path, config, str(uri)), str(uri))
        if "architecture" in config:
            return _assemble(read_timm(path, config, str(uri)), str(uri))
    raise ValueError(f"{uri}: config.json is neither timm's (architecture) nor an I-JEPA's")


def load_strict(encoder: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads all weights or raises, naming what is missing, left over or of another shape.

    Raises:
        ValueError: the state does not fit exactly.
    """
    own = encoder.state_dict()
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{k} {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
            for k in sorted(own.keys() & state.keys())
            if own[k].shape != state[k].shape
        ],
    }
    if any(faults.values()):
        text = "; ".join(f"{len(v)} {kind}: {_some(v)}" for kind, v in faults.items() if v)
        raise ValueError(f"{source}: weights do not fit the encoder; {text}")
    encoder.load_state_dict(dict(state))


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _require_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    if not config.is_file() or "rayjepa" not in json.loads(config.read_text()):
        raise ValueError(f"{folder} exists and is not an artifact of ours; not replacing it")


# --- writing ---------------------------------------------------------------------------------


def _write_files(
    folder: Path,
    encoder: VisionTransformer,
    prep: Preprocessing,
    provenance: Mapping[str, Any],
) -> None:
    state = {k: v.detach().float().cpu().contiguous() for k, v in encoder.state_dict().items()}
    (folder / "transformers").mkdir(parents=True)
    metadata = {"format": "pt"}  # transformers refuses a file without it
    save_file(state, folder / "model.safetensors", metadata)
    save_file(to_transformers(state), folder / "transformers" / "model.safetensors", metadata)
    config = _timm_config(encoder, prep) | {"rayjepa": _our_config(encoder, prep, provenance)}
    _write_json(folder / "config.json", config)
    _write_json(folder / "transformers" / "config.json", _transformers_config(encoder))
    _write_json(folder / "transformers" / "preprocessor_config.json", _processor_config(prep))


def _verify(folder: Path, encoder: VisionTransformer, prep: Preprocessing) -> None:
    """Compares features of random images before and after the round trip, bit for bit."""
    loaded = load_artifact(folder)
    side, again = prep.image_size, loaded.preprocessing
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    device = encoder.pos_embed.device
    with torch.inference_mode():
        before = encoder(normalize(images_BCHW, prep.mean, prep.std).to(device))
        loaded.encoder.to(device)
        after = loaded.encoder(normalize(images_BCHW, again.mean, again.std).to(device))
    if not torch.equal(before, after):
        worst = float((before - after).abs().max())
        raise RuntimeError(f"the artifact read back gives other features (by up to {worst:g})")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _shape(encoder: VisionTransformer) -> dict[str, Any]:
    return {
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "width": encoder.width,
        "depth": encoder.depth,
        "heads": encoder.heads,
        "mlp_ratio": encoder.mlp_ratio,
        "patch_std": encoder.patch_std,
    }


def _our_config(
    encoder: VisionTransformer, prep: Preprocessing, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "encoder": _shape(encoder),
        "preprocessing": dataclasses.asdict(prep),
        "pooling": "mean",
        "provenance": dict(provenance),
    }


def _timm_config(encoder: VisionTransformer, prep: Preprocessing) -> dict[str, Any]:
    size = encoder.image_size
    key = (encoder.width, encoder.depth, encoder.patch_size, size)
    return {
        "architecture": TIMM_NAMES.get(key, TIMM_DEFAULT),
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "avg",
        "model_args": {
            "img_size": size,
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": encoder.mlp_ratio,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": prep.interpolation,
            "crop_pct": prep.crop_fraction,
            "crop_mode": "center",
            "mean": list(prep.mean),
            "std": list(prep.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _transformers_config(encoder: VisionTransformer) -> dict[str, Any]:
    return {
        "model_type": "ijepa",
        "architectures": ["IJepaModel"],
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.state_dict()["blocks.0.mlp.fc1.bias"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": encoder.norm.eps,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def _processor_config(prep: Preprocessing) -> dict[str, Any]:
    """BiT's processor: resize the short side, crop the centre (ViT's would squash the picture)."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(prep.image_size / prep.crop_fraction)},
        "resample": int(RESAMPLING[prep.interpolation]),
        "do_center_crop": True,
        "crop_size": {"height": prep.image_size, "width": prep.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(prep.mean),
        "image_std": list(prep.std),
    }


# --- reading ---------------------------------------------------------------------------------


@contextmanager
def _local(uri: str) -> Iterator[Path]:
    """The artifact as a local path; a remote one is downloaded for as long as the block lasts."""
    fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    if not fs.exists(root):
        raise FileNotFoundError(f"{uri}: nothing there")
    if "file" in fs.protocol:
        yield Path(root)
        return
    with tempfile.TemporaryDirectory(prefix="artifact-") as scratch:
        target = Path(scratch) / Path(root).name
        if fs.isfile(root):
            fs.get_file(root, str(target))
        else:
            target.mkdir()
            # Not recursive: the transformers copy doubles the download for nothing.
            for name in fs.ls(root, detail=False):
                if Path(name).suffix in (".json", ".safetensors"):
                    fs.get_file(name, str(target / Path(name).name))
        yield target


def _load_ours(folder: Path, ours: dict[str, Any], uri: str) -> Artifact:
    if ours.get("schema_version") != SCHEMA_VERSION:
        version = ours.get("schema_version")
        raise ValueError(f"{uri}: artifact schema {version}, this code reads {SCHEMA_VERSION}")
    values: dict[str, Any] = dict(ours["preprocessing"])
    prep = Preprocessing(**values | {k: tuple(values[k]) for k in ("mean", "std")})
    state = read_state(folder, uri)
    return _assemble(Source(ours["encoder"], prep, state), uri, ours)


def _assemble(source: Source, uri: str, ours: dict[str, Any] | None = None) -> Artifact:
    encoder = VisionTransformer(**source.shape)
    load_strict(encoder, source.state, uri)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = source.layer_norm_eps
    encoder.eval().requires_grad_(False)
    config = ours or _our_config(encoder, source.preprocessing, {"source": uri})
    return Artifact(encoder, source.preprocessing, config)
