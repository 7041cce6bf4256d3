"""The tiny model's greedy text, computed by `decode` alone, one token at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.lm.serving import load_ids
from models.sink_lm.checkpoints.loading import load_model


@torch.inference_mode()
def greedy(folder: Path, prompt: str, count: int, *, cache: int = 32, sinks: int = 4) -> list[int]:
    model = load_model(str(folder))
    slabs = model.slabs(sessions=1, capacity=cache)
    slot, out = slabs.allocate(sinks), load_ids(prompt)
    given = len(out)
    for index in range(given + count - 1):
        logits = model.decode(torch.tensor(out[index : index + 1]), slabs, [slot])
        if index >= given - 1:
            out.append(int(logits.argmax()))
    return out[given:]
