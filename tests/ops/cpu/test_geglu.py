"""GEGLU in one pass against its formula in float64, and beside PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.cpu.build import library
from lorasmith.ops.cpu.geglu import geglu

pytestmark = pytest.mark.skipif(library() is None, reason="no AVX-512 for bf16, or no compiler")


def plain(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, -1)
    return hidden * F.gelu(gate)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 5, 66), (3, 2), (2, 3, 4, 30), (1, 300, 512)], ids=str)
@pytest.mark.parametrize("size", [0.01, 1, 5])
def test_result_and_gradient_are_more_exact_than_pytorchs(shape: tuple[int, ...], size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (size * torch.randn(shape, generator=generator)).bfloat16().requires_grad_()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).bfloat16()
    exact = x.detach().double().requires_grad_()
    right = [plain(exact), *torch.autograd.grad(plain(exact), exact, grad.double())]
    found = [geglu(x), *torch.autograd.grad(geglu(x), x, grad)]
    pytorchs = [plain(x), *torch.autograd.grad(plain(x), x, grad)]
    for own, others, expected in zip(found, pytorchs, right, strict=True):
        assert error(own, expected) <= 1.05 * error(others, expected) < 0.01


def test_every_gate_is_within_rounding() -> None:
    gate = torch.linspace(-12, 12, 5001).bfloat16()
    x = torch.stack([torch.ones_like(gate), gate], -1)
    exact = F.gelu(gate.double())
    assert ((geglu(x)[:, 0] - exact).abs() <= exact.abs() * 2**-8 + 2e-7).all()
    assert geglu(torch.tensor([1, torch.inf]).bfloat16()) == torch.inf
    assert geglu(torch.tensor([1, torch.nan]).bfloat16()).isnan()


def test_any_layout_and_dtype() -> None:
    x = torch.randn(4, 6, 40).bfloat16()
    grad = torch.randn(4, 6, 20).bfloat16()
    expected = geglu(x)
    leaf = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    y = geglu(leaf)
    assert torch.equal(y, expected)
    back = grad.transpose(0, 2).contiguous().transpose(0, 2)
    x.requires_grad_()
    assert torch.equal(*(torch.autograd.grad(geglu(t), t, g)[0] for t, g in ((leaf, back), (x, grad))))
    assert torch.equal(geglu(x.float()), plain(x.float()))
    assert geglu(x[:0]).shape == (0, 6, 20)
