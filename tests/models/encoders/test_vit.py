"""The image encoder: patches, kept tokens, presets, refusals and plain attention."""

import copy

import pytest
import torch

from models.encoders.blocks import use_plain_attention
from models.encoders.shape import PRESETS, EncoderShape
from models.encoders.vit import VisionTransformer, build_encoder, gather_tokens


def small() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(EncoderShape(image_size=32, patch_size=8, width=48, depth=2, heads=3))


def test_patches_times_weight_is_the_convolution() -> None:
    encoder, images = small(), torch.randn(2, 3, 32, 32)
    patches = encoder.patch_embed.patchify(images)
    convolved = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(patches), convolved, atol=1e-5, rtol=1e-5)


def test_only_kept_patches_affect_the_output() -> None:
    encoder, images = small(), torch.randn(2, 3, 32, 32)
    keep = torch.tensor([[0, 5, 10], [1, 2, 15]])
    kept = encoder(images, keep)
    assert kept.shape == (2, 3, 48)
    hidden = images.clone()
    hidden[0, :, 8:16, 16:24] = 99.0  # patch 6 of image 0, which is not kept
    torch.testing.assert_close(encoder(hidden, keep), kept)
    hidden[0, :, 8:16, 8:16] = 99.0  # patch 5, which is
    assert not torch.allclose(encoder(hidden, keep), kept)


def test_keeping_all_tokens_equals_passing_none() -> None:
    encoder, images = small(), torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encoder(images, everything), encoder(images))


def test_gather_tokens() -> None:
    tokens = torch.arange(24.0).reshape(2, 4, 3)
    ids = torch.tensor([[3, 0], [1, 1]])
    torch.testing.assert_close(gather_tokens(tokens, ids)[1, 0], tokens[1, 1])
    torch.testing.assert_close(gather_tokens(tokens, ids)[0], tokens[0, [3, 0]])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_fit_together(name: str) -> None:
    shape = PRESETS[name]
    assert shape.width % shape.heads == 0
    assert shape.predictor_width % shape.predictor_heads == 0
    assert shape.predictor_width % 4 == 0
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=224, patch_size=14 if name == "vit_h" else 16)
    assert encoder(torch.empty(1, 3, 224, 224, device="meta")).shape[2] == shape.width


def test_parameter_counts_match_the_paper() -> None:
    """ViT-H/14 has 630M parameters (backbone of I-JEPA, table 1), and ViT-S/16 21.6M (DeiT)."""
    with torch.device("meta"):
        counts = {
            name: sum(
                p.numel() for p in build_encoder(name, image_size=224, patch_size=p).parameters()
            )
            for name, p in (("vit_s", 16), ("vit_h", 14))
        }
    assert counts["vit_s"] == pytest.approx(21.6e6, rel=0.01)
    assert counts["vit_h"] == pytest.approx(630.8e6, rel=0.01)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="expected images"):
        small()(torch.randn(1, 3, 48, 48))
    with pytest.raises(ValueError, match="does not divide"):
        VisionTransformer(EncoderShape(image_size=30, patch_size=8, width=48, depth=1, heads=3))


def test_plain_attention_is_the_same_function() -> None:
    torch.manual_seed(0)
    fused = build_encoder("vit_micro32", image_size=32, patch_size=8)
    plain = copy.deepcopy(fused)
    use_plain_attention(plain)
    assert all(block.attn.fused_attn for block in fused.blocks)
    assert not any(block.attn.fused_attn for block in plain.blocks)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(plain(images), fused(images), rtol=0, atol=1e-5)


def test_plain_rotary_attention_is_the_same_function() -> None:
    torch.manual_seed(0)
    fused = build_encoder("video_micro", image_size=32, patch_size=8, positions="rope")
    plain = copy.deepcopy(fused)
    use_plain_attention(plain)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(plain(images), fused(images), rtol=0, atol=1e-5)
