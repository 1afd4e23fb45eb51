"""Products of all pairs of rows against their formula in float64."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lorasmith.ops.cpu.build import in_use, library
from lorasmith.ops.face_splitting import MOST, pairs

needs_library = pytest.mark.skipif(library() is None, reason="no AVX-512 for bf16, or no compiler")


@pytest.mark.parametrize("way", [nullcontext, pytest.param(in_use, marks=needs_library)], ids=["pytorch", "own"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 8, 320), (3, 5, 33), (2, MOST, 17), (2, MOST + 1, 17)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_formula(way: Any, sizes: tuple[int, int, int], transposed: bool) -> None:
    r, s, n = sizes
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int) -> torch.Tensor:
        found = torch.randn(n, rows, generator=generator).bfloat16()
        return found.t() if transposed else found.t().contiguous()

    a, b, grad = drawn(r).requires_grad_(), drawn(s).requires_grad_(), drawn(r * s)
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    products = torch.einsum("rn,sn->rsn", *exact).flatten(0, 1)
    with way():
        found = pairs(a, b)
        grads = torch.autograd.grad(found, (a, b), grad)
    expected = torch.autograd.grad(products, exact, grad.double())
    torch.testing.assert_close(found.double(), products, rtol=2**-8, atol=0)
    for own, right in zip(grads, expected, strict=True):
        assert (own.double() - right).norm() <= 2**-7 * right.norm()
