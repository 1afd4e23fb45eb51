"""The backward pass of attention against autograd's in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.kernels.attention import fast_attention
from lorasmith.kernels.native import library


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.skipif(library() is None, reason="the processor has no matrix unit, or there is no compiler")
@pytest.mark.parametrize(
    "shape", [(1, 2, 64, 64, 40), (2, 3, 100, 77, 40), (1, 2, 33, 7, 80), (1, 2, 130, 77, 160), (1, 1, 300, 300, 16)]
)
def test_gradients_are_as_exact_as_pytorchs(shape: tuple[int, ...]) -> None:
    batch, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, n, heads, width, generator=generator).bfloat16().transpose(1, 2)
        for n in (queries, keys, keys, queries)
    ]
    grad = tensors.pop()
    exact = [t.double().requires_grad_() for t in tensors]
    weights = torch.softmax(exact[0] @ exact[1].mT * width**-0.5, -1)
    expected = torch.autograd.grad(weights @ exact[2], exact, grad.double())
    leaves = [t.requires_grad_() for t in tensors]
    plain = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)
    before = F.scaled_dot_product_attention
    with fast_attention():
        assert F.scaled_dot_product_attention is not before
        ours = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)
    assert F.scaled_dot_product_attention is before
    for own, pytorchs, right in zip(ours, plain, expected, strict=True):
        assert error(own, right) <= 1.1 * error(pytorchs, right) < 0.01
