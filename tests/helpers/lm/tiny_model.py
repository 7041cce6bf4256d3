"""A tiny random decoder and a byte tokenizer for tests of the engine and the server."""

from __future__ import annotations

import codecs
import gc
import itertools
import sys
from types import FunctionType, ModuleType

import torch

from models.sink_lm.network.config import LMConfig
from models.sink_lm.network.llama import Llama

EOS = 256


class ByteStream:
    """Decodes bytes to text, whole characters only."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < EOS else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """A tokenizer whose token ids are bytes; 256 ends a text."""

    bos_id = None
    adds_bos = False
    eos_ids = (EOS,)
    vocab_size = 257

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < EOS).decode(errors="replace")

    def stream(self) -> ByteStream:
        return ByteStream()


def tiny_llama(seed: int = 0, **changes: int) -> Llama:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    model = Llama(LMConfig(**(shape | changes)))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.double().eval().requires_grad_(False)


def scripted_llama(script: str) -> Llama:
    """A decoder that follows each byte of `script` by the next one, and the last by the end token.

    Only for scripts whose bytes all differ: the last token alone decides.
    """
    ids = [*script.encode(), EOS]
    assert len(set(ids)) == len(ids)
    cfg = LMConfig(
        vocab_size=257,
        hidden_size=258,
        intermediate_size=2,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
    )
    model = Llama(cfg).double().eval().requires_grad_(False)
    for parameter in model.layers.parameters():
        parameter.zero_()
    model.embed.weight.zero_()
    model.embed.weight[:, :257] = torch.eye(257)
    model.head.weight.zero_()
    for now, after in itertools.pairwise(ids):
        model.head.weight[after, now] = 1.0
    return model


def held_bytes(*roots: object) -> int:
    """Returns the bytes of all objects that `roots` keep alive, without code.

    Unlike `tracemalloc` it does not count what Ray's threads in this process allocate meanwhile.
    """
    seen: dict[int, object] = {}
    queue = [*roots]
    while queue:
        one = queue.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
            continue
        seen[id(one)] = one
        queue += gc.get_referents(one)
    tensors = [one for one in seen.values() if isinstance(one, torch.Tensor)]
    return sum(map(sys.getsizeof, seen.values())) + sum(
        t.untyped_storage().nbytes() for t in tensors
    )
