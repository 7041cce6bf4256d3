"""Imports timm and torchvision without PyTorch's compiler, which is loaded when it is needed.

torchvision and timm ask the compiler for two functions while they are imported, one to leave a
function uncompiled and one to ask whether a device can compile. Nothing here compiles, but for
these two every process would load the compiler, `torch._dynamo`: a third of all that it imports.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
TOOLS = f"{COMPILER}.utils"


@contextmanager
def compiler_on_demand() -> Iterator[None]:
    """While the block imports, those two functions are promises, kept when they are called.

    Whatever else the block asks of the compiler loads it at once. A compiler that is loaded already
    is used as it is.
    """
    if COMPILER in sys.modules:
        yield
        return
    compiler, tools = _Promised(COMPILER), _Promised(TOOLS)
    compiler.__path__ = []  # a package
    compiler.disable = _disable  # type: ignore[attr-defined]
    tools.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules |= {COMPILER: compiler, TOOLS: tools}
    try:
        yield
    finally:
        _make_way()


class _Promised(ModuleType):
    """Stands in for a module that is not loaded until one of its other attributes is read."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system itself looks for
            raise AttributeError(name)
        _make_way()
        return getattr(importlib.import_module(self.__name__), name)


def _make_way() -> None:
    for name in (COMPILER, TOOLS):
        if isinstance(sys.modules.get(name), _Promised):
            del sys.modules[name]


def _disable(function: Callable[..., Any] | None = None, *given: Any, **named: Any) -> Any:
    """As `torch._dynamo.disable`; the compiler is loaded at the first call of the function."""
    if function is None:
        return lambda decorated: _disable(decorated, *given, **named)

    @functools.cache
    def disabled() -> Callable[..., Any]:
        made: Callable[..., Any] = importlib.import_module(COMPILER).disable(
            function, *given, **named
        )
        return made

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        return disabled()(*arguments, **keywords)

    return run


def _is_compile_supported(device_type: str) -> bool:
    return bool(importlib.import_module(TOOLS).is_compile_supported(device_type))


_is_compile_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as the real one
