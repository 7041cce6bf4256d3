"""The artifact: an encoder on disk that timm and transformers load without this project.

    DIR/model.safetensors             weights under timm's names
    DIR/config.json                   timm's hub form, plus our section `rayjepa`
    DIR/surprise.safetensors          context encoder, predictor and usual errors, if they were
                                      exported (models/beliefs/stored.py)
    DIR/digests.json                  digests of these files, which are compared when they are read
    DIR/transformers/                 the same encoder for `transformers.IJepaModel`, with its
                                      config.json and preprocessor_config.json

timm has no model for encoders of clips or for image encoders with rotary positions; config.json
then holds our section alone. With the rotary layout of V-JEPA 2's published weights,
DIR/transformers/ is a `transformers.VJEPA2Model`, with the predictor if one is given. With other
rotary layouts it is not written, because no model of transformers computes the same.

`load_artifact` reads these folders, other people's in the same formats, and Meta's checkpoint
files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.artifacts.fingerprint import content_fingerprint
from models.artifacts.formats.format import Export, Format, Source, Stored
from models.artifacts.formats.meta_ijepa import META_IJEPA
from models.artifacts.formats.rayjepa import RAYJEPA, our_section
from models.artifacts.formats.timm_vit import TIMM_VIT
from models.artifacts.formats.transformers_ijepa import TRANSFORMERS_IJEPA
from models.artifacts.formats.transformers_vjepa2 import TRANSFORMERS_VJEPA2
from models.digests import DIGESTS, DamagedFileError, check_file, read_digests, write_digests
from models.encoders.blocks import LN_EPS
from models.encoders.input_batch import InputBatch, encode
from models.encoders.predictor import Predictor
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.file_systems import url_to_fs
from models.image_size import height_width
from models.media.preprocessing import EncoderInput, Preprocessing, normalize, prepare
from models.scratch import scratch

FORMATS: tuple[Format, ...] = (
    RAYJEPA,
    TRANSFORMERS_IJEPA,
    TRANSFORMERS_VJEPA2,
    TIMM_VIT,
    META_IJEPA,
)
"""The table of formats. Reading takes the first that recognises the files; writing visits all."""

Network = TypeVar("Network", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An encoder, and what is needed to use it."""

    encoder: VisionTransformer
    """In eval mode, in fp32, on the CPU."""
    preprocessing: Preprocessing
    config: dict[str, Any]
    """Our section of config.json: schema_version, encoder, preprocessing, pooling, provenance."""
    fingerprint: str = ""
    """See `models.artifacts.fingerprint`."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of the weights: run, step and manifest_hash, or the URI of a foreign model."""
        return dict(self.config["provenance"])


def save_artifact(
    folder: Path,
    encoder: VisionTransformer,
    preprocessing: Preprocessing,
    provenance: Mapping[str, Any],
    predictor: Predictor | None = None,
    add: Callable[[Path], object] | None = None,
) -> list[str]:
    """Writes an artifact, reads it back, and only then puts it in place.

    Args:
        folder: does not exist, is empty, or holds an earlier artifact, which is replaced.
        provenance: run, step, manifest_hash and anything else that JSON can hold.
        predictor: goes into the `VJEPA2Model`, if one is written.
        add: writes further files into the new folder.

    Returns:
        Sentences that say what timm or transformers cannot do as this project does.

    Raises:
        ValueError: the folder holds something else, the encoder's LayerNorm eps is not timm's, or
            image sizes or positions do not match.
        RuntimeError: the artifact that was read back gives different features.
    """
    if encoder.norm.eps != LN_EPS:
        raise ValueError(f"timm's ViT has LayerNorm eps {LN_EPS}, this encoder {encoder.norm.eps}")
    if encoder.image_size != preprocessing.image_size:
        sizes = f"{preprocessing.image_size} and {encoder.image_size}"
        raise ValueError(f"preprocessing and encoder differ in image size: {sizes}")
    if preprocessing.patch_size not in (None, encoder.patch_size):
        sizes = f"{preprocessing.patch_size} and {encoder.patch_size}"
        raise ValueError(f"preprocessing and encoder differ in patch size: {sizes}")
    if predictor is not None and predictor.positions != encoder.positions:
        kinds = f"{encoder.positions} and {predictor.positions}"
        raise ValueError(f"encoder and predictor differ in positions: {kinds}")
    export = Export(
        encoder=encoder, preprocessing=preprocessing, provenance=provenance, predictor=predictor
    )
    _require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        new = Path(beside) / "artifact"
        _write_files(new, export, add)
        _verify(new, encoder, preprocessing)
        if folder.exists():
            folder.rename(Path(beside) / "old")
        new.rename(folder)
    return [line for known in FORMATS for line in known.limits(export)]


def load_artifact(uri: str | Path) -> Artifact:
    """Loads an encoder from an artifact or from another format of `FORMATS`.

    Args:
        uri: local or `s3://` folder of an artifact, of a timm model without class token (such as
            `vit_huge_patch14_gap_224.in1k_ijepa`), of a `transformers.IJepaModel` or of a
            `VJEPA2Model`; or a released I-JEPA checkpoint file (`.pth.tar`).

    Raises:
        FileNotFoundError: there is nothing at the URI.
        ValueError: it is none of these formats, a file is not as it was saved, or weights are
            missing, left over or of another shape; they are named.
    """
    with _stored(str(uri)) as stored:
        if stored.path.is_dir() and not (stored.path / "config.json").is_file():
            raise ValueError(f"{uri}: no config.json; not an artifact")
        for known in FORMATS:
            if known.recognises(stored):
                artifact = _assemble(known.read(stored), stored.uri)
                fingerprint = content_fingerprint(stored.path, stored.digests)
                return dataclasses.replace(artifact, fingerprint=fingerprint)
    raise ValueError(f"{uri}: config.json is neither timm's (architecture) nor a JEPA's")


def load_predictor(uri: str | Path) -> Predictor:
    """Loads the predictor of a `transformers.VJEPA2Model`, in eval mode, fp32, on the CPU.

    Args:
        uri: local or `s3://` folder of the model; for an artifact, its `transformers/`.

    Raises:
        FileNotFoundError: there is nothing at the URI.
        ValueError: it is no such model, it has no predictor, or its weights do not fit.
    """
    with _stored(str(uri)) as stored:
        for known in FORMATS:
            if known.read_predictor and known.recognises(stored):
                source = known.read_predictor(stored)
                return _fill(Predictor(**source.shape), source, stored.uri)
    raise ValueError(f"{uri}: not a VJEPA2Model; no predictor to load")


@contextmanager
def local_files(uri: str) -> Iterator[Path]:
    """Yields a local folder with the files of an artifact, for what stands beside the encoder.

    Raises:
        FileNotFoundError: there is nothing at the URI.
        ValueError: a file is not as it was saved.
    """
    with _stored(uri) as stored:
        yield stored.path


def load_strict(encoder: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads all weights into a module.

    Args:
        encoder: the module to fill.
        state: weights under the module's names.
        source: where they come from, for the error message.

    Raises:
        ValueError: weights are missing, left over or of another shape; they are named.
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
        raise ValueError(f"{source}: weights do not fit the model; {text}")
    encoder.load_state_dict(dict(state))


def weights_hash(encoder: VisionTransformer) -> str:
    """Returns 32 hex digits of a hash of an encoder's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _require_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    if not config.is_file() or "rayjepa" not in json.loads(config.read_text()):
        raise ValueError(f"{folder} exists and is not an artifact of ours; not replacing it")


# --- writing ---------------------------------------------------------------------------------


def _write_files(folder: Path, export: Export, add: Callable[[Path], object] | None = None) -> None:
    folder.mkdir()
    for known in FORMATS:
        if known.write and known.can_write(export.encoder):
            known.write(folder, export)
    if add is not None:
        add(folder)
    for place in {file.parent for file in folder.rglob("*") if file.is_file()}:
        write_digests(place, [file.name for file in place.iterdir() if file.is_file()])


def _verify(folder: Path, encoder: VisionTransformer, prep: Preprocessing) -> None:
    """Checks that the artifact read back gives the same features of random pixels, bit for bit."""
    loaded = load_artifact(folder)
    size, again = height_width(prep.image_size), loaded.preprocessing
    length = min(encoder.frames, 2 * encoder.tubelet)  # longer clips would take minutes
    shape = (2, 3, *size) if encoder.frames == 1 else (2, 3, length, *size)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    device = encoder.norm.weight.device
    with torch.inference_mode():
        before = encoder(normalize(clips, prep.mean, prep.std).to(device))
        loaded.encoder.to(device)
        after = loaded.encoder(normalize(clips, again.mean, again.std).to(device))
    _require_equal(before, after)
    if prep.partial:
        with torch.inference_mode():
            before = _partial_tokens(encoder, prep, length)
            after = _partial_tokens(loaded.encoder, again, length)
        _require_equal(before, after)


def _require_equal(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        shapes = f"{tuple(before.shape)}, now {tuple(after.shape)}"
        raise RuntimeError(f"the artifact read back gives other features ({shapes})")
    if not torch.equal(before, after):
        worst = float((before - after).abs().max())
        raise RuntimeError(f"the artifact read back gives other features (by up to {worst:g})")


def _partial_tokens(encoder: VisionTransformer, prep: Preprocessing, frames: int) -> Tensor:
    """Encodes a random picture, or a clip of it, that lacks tokens or has a grid of its own."""
    prep = dataclasses.replace(prep, patch_size=encoder.patch_size)
    height, width = height_width(prep.image_size)
    shape = (height, 2 * width if prep.fit == "whole" else width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture = prepare(Image.fromarray(pixels), prep)
    if encoder.frames > 1:
        picture = EncoderInput(np.stack([picture.pixels] * frames), picture.kept)
    return encode(encoder, InputBatch.of([picture], prep), prep).tokens_BKD


# --- reading ---------------------------------------------------------------------------------


@contextmanager
def _stored(uri: str) -> Iterator[Stored]:
    """Yields what is at a URI; a local copy lasts as long as the block."""
    with _local(uri) as path:
        digests = _check_digests(path, uri)
        file = path / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else {}
        yield Stored(path=path, config=config, uri=uri, digests=digests)


def _check_digests(folder: Path, uri: str) -> dict[str, str]:
    """Compares the files of a folder with their digests, if it has any.

    Returns:
        The digests by file name, of the files that are there.

    Raises:
        ValueError: They differ; the message names the file.
    """
    if not (folder / DIGESTS).is_file():
        return {}
    try:
        digests = read_digests(folder)
        there = {name: digest for name, digest in digests.items() if (folder / name).is_file()}
        for name in there:
            check_file(folder / name, digests)
    except DamagedFileError as error:
        raise ValueError(
            f"{uri.rstrip('/')}/{error}.\nExport the artifact again, or copy it from where it is "
            f"whole. If the change was made on purpose, remove {DIGESTS}."
        ) from error
    return there


@contextmanager
def _local(uri: str) -> Iterator[Path]:
    """Yields the local path of a URI; a remote one is downloaded for the length of the block."""
    fs, root = url_to_fs(uri)
    if not fs.exists(root):
        raise FileNotFoundError(f"{uri}: nothing there")
    if "file" in fs.protocol:
        yield Path(root)
        return
    with scratch("artifact") as folder:
        target = folder / Path(root).name
        if fs.isfile(root):
            fs.get_file(root, str(target))
        else:
            target.mkdir()
            # Not recursive, because the copy for transformers would double the download.
            for name in fs.ls(root, detail=False):
                if Path(name).suffix in (".json", ".safetensors"):
                    fs.get_file(name, str(target / Path(name).name))
        yield target


def _assemble(source: Source, uri: str) -> Artifact:
    encoder = _fill(VisionTransformer(EncoderShape(**source.shape)), source, uri)
    prep = dataclasses.replace(source.preprocessing, patch_size=encoder.patch_size)
    config = source.section or our_section(encoder, prep, {"source": uri})
    return Artifact(encoder, prep, config)


def _fill(network: Network, source: Source, uri: str) -> Network:
    load_strict(network, source.state, uri)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = source.layer_norm_eps
    return network.eval().requires_grad_(False)
