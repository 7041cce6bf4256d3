"""Describing our encoders to timm and transformers: the JSON beside the weights."""

from __future__ import annotations

from typing import Any

from models.encoders.predictor import Predictor
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import RESAMPLING, Preprocessing

# timm's own names of these shapes; any other shape goes under the first with its arguments spelt
# out, which timm applies on top.
TIMM_DEFAULT = "vit_base_patch16_gap_224"
TIMM_NAMES = {
    (1280, 32, 14, 224): "vit_huge_patch14_gap_224",
    (1280, 32, 16, 448): "vit_huge_patch16_gap_448",
    (1408, 40, 16, 224): "vit_giant_patch16_gap_224",
}


def timm_config(encoder: VisionTransformer, prep: Preprocessing) -> dict[str, Any]:
    """The config.json of a timm model on the hub."""
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


def ijepa_config(encoder: VisionTransformer) -> dict[str, Any]:
    """The config.json of a `transformers.IJepaModel`."""
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


def processor_config(prep: Preprocessing) -> dict[str, Any]:
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


def vjepa2_config(encoder: VisionTransformer, predictor: Predictor | None) -> dict[str, Any]:
    """The config.json of a `transformers.VJEPA2Model`; its predictor has no layers if not given."""
    config = {
        "model_type": "vjepa2",
        "architectures": ["VJEPA2Model"],
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "mlp_ratio": encoder.mlp_ratio,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm.eps,
        "crop_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "frames_per_clip": encoder.frames,
        "tubelet_size": encoder.tubelet,
        "in_chans": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if predictor is None:
        return config | {"pred_num_hidden_layers": 0}
    return config | {
        "pred_hidden_size": predictor.embed.out_features,
        "pred_num_hidden_layers": len(predictor.blocks),
        "pred_num_attention_heads": predictor.heads,
        "pred_mlp_ratio": predictor.mlp_ratio,
        "pred_num_mask_tokens": len(predictor.mask_token),
    }


def video_processor_config(prep: Preprocessing) -> dict[str, Any]:
    """LLaVA-OneVision's processor: V-JEPA 2's own always crops 7/8 of the short side."""
    config = processor_config(prep)
    del config["image_processor_type"]
    return config | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
