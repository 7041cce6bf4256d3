"""The type of weights that a setting names, or that suits a model and a device."""

from __future__ import annotations

import torch

from models.sink_lm.checkpoints.checkpoint import locate
from models.sink_lm.checkpoints.gguf_file import open_gguf
from models.sink_lm.dtype_names import DTypeName
from models.sink_lm.network.int4 import INT4, is_supported
from models.sink_lm.network.tuning import can_pack

_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int4": INT4,
}


def dtype_of(name: DTypeName, model: str, device: torch.device | str) -> torch.dtype:
    """Returns the type that a setting names.

    `auto` is the fastest type that keeps what the checkpoint holds: on a CPU that multiplies
    bfloat16 `int4` for a GGUF file of 4-bit weights, else bfloat16; on another CPU float32; on
    other devices bfloat16.

    Args:
        name: the setting.
        model: what `load_model` takes.
        device: where the weights go.

    Raises:
        FileNotFoundError: `auto`, and there is no model.
        UnsupportedModel: `auto`, and the model cannot stream.
        ValueError: `auto`, and the file is damaged.
    """
    if name != "auto":
        return _DTYPES[name]
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    if not can_pack(torch.bfloat16):
        return torch.float32
    source = locate(model)
    has_few_bits = source.is_file() and is_supported(device) and open_gguf(source).few_bits
    return INT4 if has_few_bits else torch.bfloat16
