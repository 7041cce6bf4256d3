"""The table of formats: what each recognises and writes, and that one entry adds a format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.artifacts import artifact
from models.artifacts.artifact import FORMATS, load_artifact, load_predictor, save_artifact
from models.artifacts.formats.format import Format, Source, Stored
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing

SHAPE = {"image_size": 16, "patch_size": 8, "width": 24, "depth": 1, "heads": 3}
PREP = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.2,) * 3)


def written(tmp_path: Path, **shape: object) -> set[str]:
    """Files of an artifact of such an encoder."""
    save_artifact(tmp_path / "a", VisionTransformer(EncoderShape(**{**SHAPE, **shape})), PREP, {})
    files = (path for path in (tmp_path / "a").rglob("*") if path.is_file())
    return {str(path.relative_to(tmp_path / "a")) for path in files}


FILES = ("config.json", "model.safetensors", "digests.json")
OURS = set(FILES)
TRANSFORMERS = {f"transformers/{name}" for name in FILES}


@pytest.mark.parametrize(
    ("shape", "files", "keys"),
    [
        (
            {},
            OURS | TRANSFORMERS | {"transformers/preprocessor_config.json"},
            {"architecture", "rayjepa"},
        ),
        ({"positions": "rope"}, OURS, {"rayjepa"}),
        (
            {"frames": 4, "tubelet": 2, "positions": "rope_released"},
            OURS | TRANSFORMERS | {"transformers/video_preprocessor_config.json"},
            {"rayjepa"},
        ),
    ],
)
def test_each_encoder_is_written_in_the_formats_that_can_hold_it(
    tmp_path: Path, shape: dict, files: set[str], keys: set[str]
) -> None:
    assert written(tmp_path, **shape) == files
    assert keys <= json.loads((tmp_path / "a" / "config.json").read_text()).keys()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"rayjepa": {}, "architecture": "vit_base_patch16_gap_224"}, "rayjepa artifact"),
        ({"model_type": "ijepa"}, "transformers.IJepaModel"),
        ({"model_type": "vjepa2"}, "transformers.VJEPA2Model"),
        ({"architecture": "vit_base_patch16_gap_224"}, "timm vision transformer"),
        ({"model_type": "bert"}, None),
    ],
)
def test_a_folder_is_recognised_by_its_config(
    tmp_path: Path, config: dict, name: str | None
) -> None:
    stored = Stored(path=tmp_path, config=config, uri="there")
    assert next((known.name for known in FORMATS if known.recognises(stored)), None) == name


def test_one_entry_adds_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionTransformer(EncoderShape(**SHAPE))

    def read(stored: Stored) -> Source:
        state = torch.load(stored.path / "weights.bin", weights_only=True)
        return Source(shape=SHAPE, preprocessing=PREP, state=state)

    ours = Format(name="new", recognises=lambda s: s.config.get("kind") == "new", read=read)
    (tmp_path / "config.json").write_text('{"kind": "new"}')
    torch.save(encoder.state_dict(), tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="neither timm's"):
        load_artifact(tmp_path)
    monkeypatch.setattr(artifact, "FORMATS", (*FORMATS, ours))
    loaded = load_artifact(tmp_path)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encoder(images), encoder.eval()(images))
    assert loaded.provenance == {"source": str(tmp_path)}
    with pytest.raises(ValueError, match="no predictor to load"):
        load_predictor(tmp_path)
