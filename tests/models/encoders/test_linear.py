"""Linear layers by oneDNN: torch's function, taken where the machine makes it faster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from models.encoders import linear as module
from models.encoders.linear import (
    LEAST,
    Linear,
    PackedLinear,
    linear,
    onednn_is_faster,
    pack_linear,
)
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from pipelines.recipes.registry import RECIPES
from pipelines.runs.checkpoints import new_objective

ONEDNN = torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="torch was built without oneDNN")


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)


def made(*shape: int, bias: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(*shape, 160, requires_grad=True)
    weight = torch.randn(224, 160, requires_grad=True)
    return (x, weight, torch.randn(224, requires_grad=True)) if bias else (x, weight)


@needs_onednn
@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (4, 33), (2, 3, 20)])
def test_it_is_the_function_and_its_derivatives(shape: tuple[int, ...], bias: bool) -> None:
    given = made(*shape, bias=bias)
    upstream = torch.randn(*shape, 224)
    found = linear(*given)
    assert "_Product" in type(found.grad_fn).__name__
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = functional.linear(*exact)
    by_found = torch.autograd.grad(found, given, upstream)
    by_exact = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip((found, *by_found), (expected, *by_exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(linear(*given), found)


@needs_onednn
@pytest.mark.usefixtures("faster")
def test_rows_that_are_not_in_order_and_frozen_weights() -> None:
    x, weight, bias = made(4, 33, bias=True)
    across = x.transpose(0, 1)
    torch.testing.assert_close(
        linear(across, weight, bias), functional.linear(across, weight, bias), rtol=1e-4, atol=1e-4
    )
    linear(x, weight.detach(), bias.detach()).sum().backward()
    assert x.grad is not None


@needs_onednn
@pytest.mark.usefixtures("faster")
def test_what_torch_does_as_fast_is_left_to_torch() -> None:
    x, weight, bias = made(96, bias=True)

    def by_torch(found: Tensor) -> bool:
        return "_Product" not in type(found.grad_fn).__name__

    assert not by_torch(linear(x, weight, bias))
    assert not by_torch(linear(x[:1], weight, bias)), "whatever the rows"
    small = LEAST // 160 - 1
    assert by_torch(linear(x, weight[:small], bias[:small])), "too small a layer"
    assert not by_torch(linear(x, weight[:small], bias[:small], least=0))
    assert by_torch(linear(x.double(), weight.double(), bias.double()))
    for odd in (x[0], x[:0]):
        assert torch.equal(linear(odd, weight, bias), functional.linear(odd, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # whose FLOPs are counted
        assert by_torch(linear(mode.from_tensor(x), mode.from_tensor(weight)))


@pytest.mark.parametrize(
    ("maker", "level", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_the_machine_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maker: str | None, level: str, expected: bool
) -> None:
    info = tmp_path / "cpuinfo"
    if maker:
        info.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(module, "CPUINFO", info)
    for library in ("mkl", "mkldnn"):
        monkeypatch.setattr(getattr(torch.backends, library), "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    assert onednn_is_faster.__wrapped__() is expected


@pytest.mark.parametrize("name", ["cifar10_demo", "lejepa_cifar10_demo", "mae_cifar10_demo"])
def test_every_linear_layer_of_a_run_is_one(name: str) -> None:
    layers = [p for p in new_objective(RECIPES[name][1]).modules() if isinstance(p, nn.Linear)]
    assert layers
    assert {type(layer) for layer in layers} == {Linear}


@needs_onednn
@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_encoder_computes_the_same(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this processor")
    torch.manual_seed(0)
    shape = EncoderShape(image_size=32, patch_size=8, width=160, depth=2, heads=2)
    encoder = VisionTransformer(shape).eval().to(dtype)
    images = torch.randn(3, 3, 32, 32, dtype=dtype)
    with torch.inference_mode():
        expected = encoder(images)
        pack_linear(encoder)
        found = encoder(images)
    assert sum(isinstance(part, PackedLinear) for part in encoder.modules()) == 8
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(found[0], found[1])


def test_only_what_onednn_computes_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    small, other = nn.Linear(8, 8).bfloat16(), nn.Linear(160, 224)
    double = nn.Linear(160, 224).double()
    layers = nn.Sequential(small, other, double)
    pack_linear(layers)
    assert list(layers) == [small, other, double]
