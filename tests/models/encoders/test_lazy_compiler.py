"""A process that compiles nothing does not load PyTorch's compiler; one that needs it, does."""

from __future__ import annotations

import subprocess
import sys

from helpers.repository import ROOT

CODE = """
import sys

import models.artifacts.artifact
import pipelines.loading.decoding
import torch
import torchvision
from models.encoders.lazy_compiler import compiler_on_demand

assert "torch._dynamo" not in sys.modules, "loaded by an import"

with compiler_on_demand():
    import torch._dynamo as promised
assert "torch._dynamo" not in sys.modules, "the promise stays behind"

with compiler_on_demand():
    import torch._dynamo
    torch._dynamo.reset()  # what is no promise loads it
    assert torch._dynamo is not promised
    assert torch._dynamo.__file__
assert promised.disable(lambda: 3)() == 3
assert promised.disable(recursive=False)(lambda: 4)() == 4

supported = sys.modules["torchvision.ops.roi_align"].is_compile_supported
assert supported("cpu") is True
assert supported("meta") is False
boxes = torch.tensor([[0, 0, 0, 2, 2.0]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), boxes, 2).shape == (1, 1, 2, 2)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
with compiler_on_demand():  # it is there by now
    assert sys.modules["torch._dynamo"].__file__
print("done")
"""


def test_the_compiler_comes_when_it_is_needed() -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
