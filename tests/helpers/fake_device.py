"""A GPU that is not there: fake tensors on `cuda`, and what would make the host wait for it.

Under `fake_gpu` tensors have a shape, a type and a device, and no data. An operation on tensors of
two devices fails, as it does on a GPU, and so does whatever needs a value: `.item()`, or a mask
whose true places are counted. Copies between host and device wait too, unless they are queued;
under `Watch` they raise `HostWait`. The traceback shows the line. Backward passes do not run on
such tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
GPU = torch.device("cuda", 0)


class HostWait(AssertionError):
    """The host would wait for the device."""


class WrongDevice(AssertionError):
    """A tensor is not on the device."""


WAITS = (HostWait, DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where the host would wait for the device."""


class Watch(TorchDispatchMode):
    """Raises at copies that wait, and stands in for what fake tensors lack.

    Args:
        copies_back: how often results may be copied to the host.
        copies_there: how often tensors may be copied to the device while the host waits.
    """

    def __init__(self, copies_back: int = 0, copies_there: int = 0) -> None:
        super().__init__()
        self.left = {"cpu": copies_back, "cuda": copies_there}
        """Copies that are still allowed, by the kind of device that they end on."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            return args[0]
        name = func.overloadpacket.__name__
        if name.startswith("_fused_"):  # fake tensors have no kernel for it that compares devices
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.device != GPU:
                    raise WrongDevice(f"{func}: a tensor is on {tensor.device}")
            return None
        result = func(*args, **kwargs)
        if name in ("_to_copy", "to", "copy_") and not _queued(func, args, kwargs):
            source = args[1] if name == "copy_" else args[0]
            self._copied(source.device, result.device)
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if index is not None:
                    self._copied(index.device, args[0].device)
        return result

    def _copied(self, source: torch.device, target: torch.device) -> None:
        if source.type == target.type:
            return
        self.left[target.type] -= 1
        if self.left[target.type] < 0:
            raise HostWait(f"a tensor on {source.type} is copied to {target.type}, and awaited")


def _queued(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy is `non_blocking`."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("non_blocking"))


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """A context in which tensors are fake, and there seems to be a GPU with bf16 for autocast."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(),
    ):
        yield


def fake(values: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Returns a fake tensor like a real one, on a device."""
    return torch.empty(values.shape, dtype=values.dtype, device=device)


def put(module: nn.Module, device: torch.device = GPU) -> nn.Module:
    """Makes a module's parameters and buffers fake and puts them on a device, one by one, in place.

    What else the module holds stays where it is, as with `.to(device)`.
    """
    moved: dict[int, Tensor] = {}  # tied weights stay one

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            made = fake(tensor, device)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            moved[id(tensor)] = made
        return moved[id(tensor)]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: of(tensor) for name, tensor in held.items() if tensor is not None})
    return module
