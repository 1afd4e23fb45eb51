"""Block-diagonal products on a layer's output against one with the whole matrix."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.ops.cpu.build import in_use, library
from lorasmith.ops.rotation import cayley, rotated

needs_library = pytest.mark.skipif(library() is None, reason="no AVX-512 for bf16, or no compiler")

SIZE, NUM_BLOCKS = 2, 3
SHAPES = [
    ((4, 6), False),
    ((2, 3, 6), False),
    ((2, 3, 2, 6), False),
    ((2, 6, 4), True),
    ((2, 6, 3, 4), True),
    ((2, 6, 2, 3, 2), True),
]
shapes = pytest.mark.parametrize(("shape", "is_conv"), SHAPES, ids=str)
biases = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])


def plain(y: Tensor, turn: Tensor, bias: Tensor | None, is_conv: bool) -> Tensor:
    rows = y.movedim(1, -1) if is_conv else y
    added = (rows if bias is None else rows - bias) @ torch.block_diag(*turn)
    return y + (added.movedim(-1, 1) if is_conv else added)


def inputs(random: Any, shape: tuple[int, ...], has_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    return random(*shape), random(NUM_BLOCKS, SIZE, SIZE), random(NUM_BLOCKS * SIZE) if has_bias else None


@shapes
@biases
def test_it_is_the_product_with_the_block_diagonal_matrix(
    random: Any, shape: tuple[int, ...], is_conv: bool, has_bias: bool
) -> None:
    y, turn, bias = inputs(random, shape, has_bias)
    torch.testing.assert_close(rotated(y, turn, bias, is_conv), plain(y, turn, bias, is_conv))


@shapes
@biases
def test_gradients(random: Any, shape: tuple[int, ...], is_conv: bool, has_bias: bool) -> None:
    y, turn, bias = inputs(random, shape, has_bias)
    constant = None if bias is None else bias.detach()
    assert torch.autograd.gradcheck(lambda y, turn: rotated(y, turn, constant, is_conv), (y, turn), fast_mode=True)


@shapes
def test_only_y_the_turn_and_the_bias_are_kept_and_what_wants_no_gradient_gets_none(
    random: Any, shape: tuple[int, ...], is_conv: bool
) -> None:
    y, turn, bias = inputs(random, shape)
    assert bias is not None
    y = y.detach()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted = rotated(y, turn, bias, is_conv)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (y, turn, bias)}
    adapted.sum().backward()
    assert y.grad is None and bias.grad is None and turn.grad is not None


@shapes
def test_any_layout(random: Any, shape: tuple[int, ...], is_conv: bool) -> None:
    y, turn, bias = inputs(random, shape)

    def results(layout: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = layout(y).detach().requires_grad_(), turn
        adapted = rotated(*leaves, bias, is_conv)
        return adapted, *torch.autograd.grad(adapted, leaves, layout(y.detach() ** 2))

    expected = results(torch.Tensor.contiguous)
    torch.testing.assert_close(results(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)), expected)
    torch.testing.assert_close(results(lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)), expected)
    torch.testing.assert_close(results(lambda t: t.repeat_interleave(2, -1)[..., ::2]), expected)


@pytest.mark.parametrize("layers", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16])
@shapes
def test_dtypes(random: Any, shape: tuple[int, ...], is_conv: bool, layers: torch.dtype, ours: torch.dtype) -> None:
    """Computed in the turn's dtype, in y's dtype in the end; no turn is the exact identity."""
    y, turn, bias = inputs(random, shape)
    assert bias is not None
    y, turn, bias = (t.detach().to(dtype) for t, dtype in ((y, layers), (turn, ours), (bias, layers)))
    adapted = rotated(y.requires_grad_(), turn.requires_grad_(), bias, is_conv)
    grads = torch.autograd.grad(adapted, (y, turn), torch.ones_like(y))
    assert adapted.dtype == layers and [g.dtype for g in grads] == [layers, ours]
    expected = plain(y.double(), turn.double(), bias.double(), is_conv)
    torch.testing.assert_close(adapted.double(), expected, rtol=0.01, atol=0.06)
    assert torch.equal(rotated(y, torch.zeros_like(turn), bias, is_conv), y)


@pytest.mark.parametrize("std", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_cayleys_transform(random: Any, std: float, size: int) -> None:
    q = (std * random(4, size, size)).detach()
    q = (q - q.mT).requires_grad_()
    eye = torch.eye(size, dtype=torch.float64)
    expected = (eye + q) @ torch.linalg.inv(eye - q) - eye
    torch.testing.assert_close(cayley(q), expected)
    grad = random(4, size, size).detach()
    torch.testing.assert_close(*(torch.autograd.grad(turn, q, grad)[0] for turn in (cayley(q), expected)))


def test_many_blocks_are_taken_together(random: Any) -> None:
    y, turn, bias = random(3, 320), random(40, 8, 8), random(320)
    torch.testing.assert_close(rotated(y, turn, bias, False), plain(y, turn, bias, False))
    constant = bias.detach()
    assert torch.autograd.gradcheck(lambda y, turn: rotated(y, turn, constant, False), (y, turn), fast_mode=True)


CASES = [
    ((5, 32), False, 8), ((2, 3, 48), False, 2), ((1, 16), False, 16), ((2, 64, 3, 5), True, 4), ((2, 24), False, 8),
]  # fmt: skip


@pytest.mark.parametrize("way", [nullcontext, pytest.param(in_use, marks=needs_library)], ids=["pytorch", "own"])
@pytest.mark.parametrize(("shape", "is_conv", "size"), CASES, ids=str)
@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16], ids=str)
@biases
def test_bf16_is_near_to_the_formula(
    random: Any, way: Any, shape: tuple[int, ...], is_conv: bool, size: int, ours: torch.dtype, has_bias: bool
) -> None:
    num = shape[1] if is_conv else shape[-1]
    y, grad, bias = random(*shape).detach().bfloat16(), random(1, *shape).detach()[0].bfloat16(), random(num).detach()
    turn, bias = random(num // size, size, size).detach().to(ours), bias.bfloat16() if has_bias else None
    if is_conv:
        y = y.contiguous(memory_format=torch.channels_last)
    exact = y.double().requires_grad_(), turn.double().requires_grad_()
    expected = plain(*exact, None if bias is None else bias.double(), is_conv)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    y, turn = y.requires_grad_(), turn.requires_grad_()
    with way():
        adapted = rotated(y, turn, bias, is_conv)
        grads = torch.autograd.grad(adapted, (y, turn), grad)
    assert adapted.stride() == y.stride() and [g.dtype for g in grads] == [y.dtype, ours]
    for found, right in ((adapted, expected), *zip(grads, expected_grads, strict=True)):
        assert (found - right).norm() < 2**-7 * right.norm()


FEW_THREADS = """
import torch
from lorasmith.ops.cpu.build import in_use
from lorasmith.ops.rotation import rotated
torch.set_num_threads(4)
y, turn = torch.randn(64, 1024).bfloat16(), (0.1 * torch.randn(64, 16, 16)).requires_grad_()
junk = [torch.full((4 * 1024 * 16,), torch.nan) for _ in range(8)]
del junk
with in_use():
    (grad,) = torch.autograd.grad(rotated(y, turn, None, False).float().sum(), turn)
blocks = y.double().view(64, 64, 16)
expected = blocks.sum(0)[:, :, None].expand(64, 16, 16)
torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-3)
"""


@pytest.mark.slow
@needs_library
def test_fewer_threads_than_asked_for() -> None:
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    ended = subprocess.run([sys.executable, "-c", FEW_THREADS], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
