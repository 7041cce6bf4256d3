"""One decode step as one call of the project's own kernels (models/sink_lm/kernels).

It computes what `Llama.decode` computes with torch, for matrices of 4 and 8 bits and keys and
values in bfloat16. Activations are float32, and 8 bits where a matrix reads them. A row's logits
do not depend on the other rows.

Legend: B sessions, V vocabulary, L layers, E hidden width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.sink_lm.kernels.build import NoKernels, library
from models.sink_lm.kernels.matrix import BLOCK, GROUP, KernelMatrix, MatrixStruct
from models.sink_lm.network.cache import Slabs
from models.sink_lm.network.config import LMConfig

MATRICES = ("qkv", "out", "gate_up", "down")
NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
# Numbers of a head that the kernels read together.
WIDTH = 32


class LayerStruct(ctypes.Structure):
    """`Layer` of decode_step.cpp."""

    _fields_ = (
        *((name, MatrixStruct) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in NORMS),
    )


class DecoderStruct(ctypes.Structure):
    """`Decoder` of decode_step.cpp."""

    _fields_ = (
        ("head", MatrixStruct),
        *((name, ctypes.c_void_p) for name in ("layers", "norm", "embedding", "frequencies")),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden", "intermediate")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_double) for name in ("eps", "rope_scale")),
    )


class BatchStruct(ctypes.Structure):
    """`Batch` of decode_step.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "slots", "lengths", "sinks", "places")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "logits")),
        *((name, ctypes.c_int64) for name in ("rows", "sessions", "capacity", "threads")),
    )


def check_shape(cfg: LMConfig) -> None:
    """Checks that the kernels' blocks divide a decoder.

    Raises:
        NoKernels: names what they do not divide.
    """
    sizes = {
        "hidden_size": (cfg.hidden_size, GROUP),
        "intermediate_size": (cfg.intermediate_size, GROUP),
        "head_dim": (cfg.head_dim, WIDTH),
        "vocab_size": (cfg.vocab_size, BLOCK),
    }
    for name, (size, block) in sizes.items():
        if size % block:
            raise NoKernels(f"the model's {name} {size} is no multiple of {block}")


class DecodeStep:
    """The decoder as the kernels read it.

    Args:
        cfg: its shape; the heads' width is a multiple of 32.
        layers: L times a layer's matrices and its norms' weights by name.
        norm_E: weight of the last norm.
        head: the head's matrix.
        embedding_VE: bfloat16.
        frequencies_F: float64 [D / 2].
        scale: factor on rotated heads.

    Raises:
        NoKernels: they cannot run here.
    """

    def __init__(
        self,
        cfg: LMConfig,
        *,
        layers: Sequence[tuple[Mapping[str, KernelMatrix], Mapping[str, Tensor]]],
        norm_E: Tensor,
        head: KernelMatrix,
        embedding_VE: Tensor,
        frequencies_F: Tensor,
        scale: float,
    ) -> None:
        self._step = library().decode_step
        check_shape(cfg)
        assert embedding_VE.dtype == torch.bfloat16
        self._vocabulary = cfg.vocab_size
        # The structures hold addresses only: these keep what lies there.
        self._kept: list[object] = [head, embedding_VE, frequencies_F]
        rows = [self._layer(matrices, norms) for matrices, norms in layers]
        self._layers = (LayerStruct * len(rows))(*rows)
        self._decoder = DecoderStruct(
            head=head.struct,
            layers=ctypes.addressof(self._layers),
            norm=self._weight(norm_E),
            embedding=embedding_VE.data_ptr(),
            frequencies=frequencies_F.data_ptr(),
            num_layers=cfg.num_layers,
            hidden=cfg.hidden_size,
            intermediate=cfg.intermediate_size,
            heads=cfg.num_heads,
            kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            eps=cfg.norm_eps,
            rope_scale=scale,
        )

    def _layer(
        self, matrices: Mapping[str, KernelMatrix], norms: Mapping[str, Tensor]
    ) -> LayerStruct:
        self._kept.append(matrices)
        structs = {name: matrix.struct for name, matrix in matrices.items()}
        return LayerStruct(**structs, **{name: self._weight(w) for name, w in norms.items()})

    def _weight(self, weight: Tensor) -> int:
        wide = weight.detach().float().contiguous()
        self._kept.append(wide)
        return wide.data_ptr()

    def __call__(self, tokens_B: Tensor, slabs: Slabs, slots: Sequence[int]) -> Tensor:
        """Writes the keys and values of one token of each session, whose slabs do not advance.

        Args:
            tokens_B: int64 [B].
            slabs: the cache, in bfloat16 on the CPU.
            slots: B different slab numbers, in any order.

        Returns:
            Logits of the next tokens, float32 [B, V].

        Raises:
            IndexError: a token does not exist.
        """
        tokens = tokens_B.tolist()
        if not all(0 <= token < self._vocabulary for token in tokens):
            raise IndexError(f"tokens {tokens} are not all below {self._vocabulary}")
        lengths = [slabs.length(slot) for slot in slots]
        sinks = [slabs.sinks(slot) for slot in slots]
        places = [slabs.slot_of(slot, n) for slot, n in zip(slots, lengths, strict=True)]
        rows_5B = torch.tensor([tokens, list(slots), lengths, sinks, places])
        logits_BV = torch.empty(len(tokens), self._vocabulary)
        batch = BatchStruct(
            *(row.data_ptr() for row in rows_5B),
            keys=slabs.keys_LNHCD.data_ptr(),
            values=slabs.values_LNHCD.data_ptr(),
            logits=logits_BV.data_ptr(),
            rows=len(tokens),
            sessions=slabs.count,
            capacity=slabs.capacity,
            threads=torch.get_num_threads(),
        )
        self._step(ctypes.byref(self._decoder), ctypes.byref(batch))
        return logits_BV
