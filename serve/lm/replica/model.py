"""Between the API's words and the engine's."""

from __future__ import annotations

import hashlib

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from models.sink_lm.network.llama import Llama


def fingerprint(model: Llama, tokenizer: Tokenizer, capacity: int) -> str:
    """Names weights, cache shape and vocabulary: 64 values of every tensor, its type and shape,
    the capacity, what every token stands for.

    Not a checksum of every byte, which would take a minute for a large model.
    """
    digest = hashlib.sha256(f"{model.cfg} {capacity}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.numpy().tobytes())
    for token in range(tokenizer.vocab_size):
        digest.update(b"%d %b" % (token, tokenizer.token_bytes(token)))
    return f"sink-{digest.hexdigest()[:16]}"
