"""Loads a decoder from a Hugging Face folder, a hub id or a GGUF file.

Every tensor of the checkpoint is used, or refused by name. Tensors are read one by one into a model
on the meta device, so that a load needs memory for the weights once and for the largest fused
tensor twice.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from models.sink_lm.checkpoints.checkpoint import Checkpoint, Shape, locate, open_folder
from models.sink_lm.checkpoints.gguf_file import open_gguf
from models.sink_lm.dtype_names import KernelsName
from models.sink_lm.kernels.build import NoKernels, library
from models.sink_lm.kernels.matrix import KernelMatrix
from models.sink_lm.network.config import LMConfig
from models.sink_lm.network.decode_step import MATRICES, NORMS, DecodeStep, check_shape
from models.sink_lm.network.int4 import INT4, Grid, Int4Linear, TiedWide, fits, is_supported
from models.sink_lm.network.int8 import ACTIVATIONS, quantised, without_weights
from models.sink_lm.network.llama import Llama

# Old checkpoints carry the frequencies, which follow from the configuration.
ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

log = logging.getLogger(__name__)


def load_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernels: KernelsName = "auto",
) -> Llama:
    """Returns the decoder at `path`, in eval mode and without gradients.

    Args:
        path: a Hugging Face folder (`config.json` and safetensors, sharded or not), a hub id, a
            `.gguf` file or a folder that holds one.
        dtype: type of the weights; quantised ones are dequantised. `torch.int8` rounds the linear
            layers to 8 bits (models/sink_lm/network/int8.py), `torch.int4` keeps those of a GGUF
            file in the bits that they have (models/sink_lm/network/int4.py); both compute in
            bfloat16.
        device: where the weights go.
        kernels: what multiplies `torch.int4` and decodes: the project's own kernels (`native`),
            torch's operators, or `auto`, the own ones where they can run.

    Raises:
        FileNotFoundError: there is no model, or a shard is missing.
        UnsupportedModel: names what cannot stream.
        ValueError: names the file, and every missing, unexpected or mis-shaped tensor; or
            `torch.int4` does not go with the file or the device, or `native` not with the
            processor or the model.
    """
    source = locate(path)
    if dtype == INT4:
        _check_int4(source, device)
    elif kernels == "native":
        raise ValueError(
            "kernels native multiply 4-bit weights only.\nTake dtype int4, or kernels auto."
        )
    with ExitStack() as stack:
        checkpoint = open_gguf(source) if source.is_file() else open_folder(source, stack)
        cfg = checkpoint.cfg
        parts = _parts(cfg)
        with torch.device("meta"):
            model = Llama(cfg)
            if dtype == torch.int8:
                _make_int8(model)
        expected = {name: shape for rows in parts.values() for name, shape in rows.items()}
        if faults := _faults(checkpoint, expected):
            raise ValueError(f"{source}: {'; '.join(faults)}")
        state: dict[str, Tensor] = {}
        for name, rows in parts.items():
            tensors = [checkpoint.read(row).to(device) for row in rows]
            whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            state |= _stored(name, whole, dtype, cfg)
        model.load_state_dict(state, assign=True)
        if dtype == INT4:
            _make_int4(model, checkpoint, parts, native=_is_native(kernels, cfg))
    return model.requires_grad_(False).eval()


def _check_int4(source: Path, device: torch.device | str) -> None:
    if not source.is_file():
        raise ValueError(
            f"dtype int4 keeps the bits of a GGUF file, and {source} holds safetensors.\n"
            "Take dtype bf16 or int8, or give a .gguf file."
        )
    if not is_supported(device):
        raise ValueError(
            f"dtype int4: torch {torch.__version__} has no 4-bit operator for the device {device}."
            "\nTake dtype bf16, or int8 on a CPU."
        )


def _is_native(kernels: KernelsName, cfg: LMConfig) -> bool:
    """Whether the own kernels are wanted and can run here; builds them if need be."""
    if kernels == "torch":
        return False
    try:
        check_shape(cfg)
        library()
    except NoKernels as error:
        if kernels == "native":
            raise ValueError(
                f"kernels native: {error}.\nTake kernels auto or torch, which are slower."
            ) from error
        log.warning("decoding by torch's operators, not the faster own kernels: %s", error)
        return False
    return True


def _make_int4(
    model: Llama,
    checkpoint: Checkpoint,
    parts: Mapping[str, Mapping[str, Shape]],
    *,
    native: bool,
) -> None:
    """Puts 4-bit layers in front of the bfloat16 ones, and one in front of the tied embedding."""
    assert checkpoint.read_grid is not None
    for index, layer in enumerate(model.layers):
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear) and fits(*child.weight.shape):
                rows = parts[f"layers.{index}.{name}.weight"]
                grid = Grid.stacked([checkpoint.read_grid(row) for row in rows])
                setattr(layer, name, Int4Linear(grid, child, child.bias, native=native))
    if fits(*model.embed.weight.shape):
        wide = TiedWide(model.embed) if model.head is None else model.head
        grid = checkpoint.read_grid(EMBED if model.head is None else HEAD)
        model.head = Int4Linear(grid, wide, native=native)
    if native:
        model.decode_step = _decode_step(model)


def _decode_step(model: Llama) -> DecodeStep:
    """Returns the decode step of a model whose matrices are all those of own kernels."""
    layers: list[tuple[dict[str, KernelMatrix], dict[str, Tensor]]] = []
    for layer in model.layers:
        norms = {name: getattr(layer, name) for name in NORMS}
        layers.append(
            (
                {name: _matrix(getattr(layer, name)) for name in MATRICES},
                {name: n.weight for name, n in norms.items() if isinstance(n, nn.RMSNorm)},
            )
        )
    frequencies_F, scale = model.rotary(torch.device("cpu"))
    return DecodeStep(
        model.cfg,
        layers=layers,
        norm_E=model.norm.weight,
        head=_matrix(model.head),
        embedding_VE=model.embed.weight,
        frequencies_F=frequencies_F,
        scale=scale,
    )


def _matrix(linear: nn.Module | None) -> KernelMatrix:
    assert isinstance(linear, Int4Linear)
    assert linear.matrix is not None
    return linear.matrix


def _make_int8(model: Llama) -> None:
    """Makes every linear layer int8, and the head, which every step reads whole, one of them."""
    for layer in model.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, without_weights(child))
    head = nn.Linear(model.cfg.hidden_size, model.cfg.vocab_size, bias=False)
    model.head = without_weights(head)


def _stored(name: str, whole: Tensor, dtype: torch.dtype, cfg: LMConfig) -> dict[str, Tensor]:
    """Returns a tensor as the model stores it: one entry, or levels and scales."""
    if dtype != torch.int8:
        return {name: whole.to(ACTIVATIONS if dtype == INT4 else dtype)}
    if name == "embed.weight":
        found = {name: whole.to(ACTIVATIONS)}
        return found | _stored("head.weight", whole, dtype, cfg) if cfg.tie_embeddings else found
    if whole.ndim == 1:
        return {name: whole.to(ACTIVATIONS)}
    levels_OI, scale_O = quantised(whole)
    return {name: levels_OI, name.removesuffix("weight") + "scale": scale_O}


def _parts(cfg: LMConfig) -> dict[str, dict[str, Shape]]:
    """Returns the checkpoint's tensors, stacked from the top row down, of each of our tensors."""
    parts: dict[str, dict[str, Shape]] = {}
    parts["embed.weight"] = {EMBED: (cfg.vocab_size, cfg.hidden_size)}
    for i in range(cfg.num_layers):
        for ours, theirs in _layer_parts(cfg).items():
            rows = {f"model.layers.{i}.{name}": shape for name, shape in theirs.items()}
            parts[f"layers.{i}.{ours}"] = rows
    parts["norm.weight"] = {"model.norm.weight": (cfg.hidden_size,)}
    if not cfg.tie_embeddings:
        parts["head.weight"] = {HEAD: (cfg.vocab_size, cfg.hidden_size)}
    return parts


def _layer_parts(cfg: LMConfig) -> dict[str, dict[str, Shape]]:
    width, inner = cfg.hidden_size, cfg.intermediate_size
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    qkv = {"q": queries, "k": keys, "v": keys}
    parts: dict[str, dict[str, Shape]] = {
        "attention_norm.weight": {"input_layernorm.weight": (width,)},
        "qkv.weight": {f"self_attn.{x}_proj.weight": (rows, width) for x, rows in qkv.items()},
        "out.weight": {"self_attn.o_proj.weight": (width, queries)},
        "mlp_norm.weight": {"post_attention_layernorm.weight": (width,)},
        "gate_up.weight": {f"mlp.{x}_proj.weight": (inner, width) for x in ("gate", "up")},
        "down.weight": {"mlp.down_proj.weight": (width, inner)},
    }
    if cfg.qkv_bias:
        parts["qkv.bias"] = {f"self_attn.{x}_proj.bias": (rows,) for x, rows in qkv.items()}
    if cfg.qk_norm:
        parts["q_norm.weight"] = {"self_attn.q_norm.weight": (cfg.head_dim,)}
        parts["k_norm.weight"] = {"self_attn.k_norm.weight": (cfg.head_dim,)}
    return parts


def _faults(checkpoint: Checkpoint, expected: Mapping[str, Shape]) -> list[str]:
    """Returns every difference between the checkpoint's tensors and the decoder's."""
    shapes = checkpoint.shapes
    extra = {name for name in shapes.keys() - expected.keys() if not ROTARY_BUFFER.fullmatch(name)}
    if checkpoint.cfg.tie_embeddings and HEAD in extra and EMBED in shapes:
        if not torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBED)):
            return [f"tie_word_embeddings is true, yet {HEAD} differs from {EMBED}"]
        extra.remove(HEAD)  # the same tensor, stored twice
    faults = [f"missing {name}" for name in expected if name not in shapes]
    faults += [f"unexpected {name}" for name in sorted(extra)]
    faults += [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    return faults
