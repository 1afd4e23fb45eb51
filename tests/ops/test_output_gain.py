"""A gain for each output against its formula in float64: our own kernel, and PyTorch's operations."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.ops.cpu.build import in_use, library
from lorasmith.ops.output_gain import gained, gained_gradients

needs_library = pytest.mark.skipif(library() is None, reason="no AVX-512 for bf16, or no compiler")
WAYS = [nullcontext, pytest.param(in_use, marks=needs_library)]
CASES = [((5, 24), -1), ((2, 3, 33), -1), ((1, 7), -1), ((2, 40, 3, 4), 1), ((2, 3, 5), 1), ((300, 320), -1)]


def inputs(shape: tuple[int, ...], axis: int, has_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    grad, y = torch.randn(2, *shape, generator=generator).bfloat16()
    gain, bias = 0.1 * torch.randn(2, shape[axis], generator=generator)
    lay = (lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)) if axis == 1 else Tensor.contiguous
    return lay(grad), lay(y), gain, bias.bfloat16() if has_bias else None


@pytest.mark.parametrize("way", WAYS, ids=["pytorch", "own"])
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
def test_the_formula(way: Any, shape: tuple[int, ...], axis: int, has_bias: bool) -> None:
    grad, y, gain, bias = inputs(shape, axis, has_bias)
    with way():
        out, (grad_y, total) = gained(y, gain, bias, axis), gained_gradients(grad, y, gain, bias, axis)
    d, z = (t.double().movedim(axis, -1) for t in (grad, y))
    unbiased = z if bias is None else z - bias.double()
    for found, exact in ((out, z + gain.double() * unbiased), (grad_y, d * (1 + gain.double()))):
        assert found.dtype == y.dtype and found.stride() == y.stride()
        torch.testing.assert_close(found.movedim(axis, -1).double(), exact, rtol=2**-7, atol=2**-9)
    sums, sizes = ((f(d) * f(unbiased)).flatten(0, -2).sum(0) for f in (Tensor.clone, Tensor.abs))
    assert ((total - sums).abs() <= 2**-7 * sizes + 1e-6).all()


@needs_library
def test_our_own_is_nearer_to_the_formula() -> None:
    grad, y, gain, bias = inputs((300, 320), -1, True)
    assert bias is not None
    exact = (grad.double() * (y.double() - bias.double())).sum(0)
    plain = gained_gradients(grad, y, gain, bias, -1)[1]
    with in_use():
        own = gained_gradients(grad, y, gain, bias, -1)[1]
    assert (own - exact).norm() < 0.1 * (plain - exact).norm()
