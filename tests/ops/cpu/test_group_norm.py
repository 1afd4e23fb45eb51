"""Group normalisation against its formula in float64, and beside PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.cpu.build import library
from lorasmith.ops.cpu.group_norm import group_norm

pytestmark = pytest.mark.skipif(library() is None, reason="no AVX-512 for bf16, or no compiler")


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def tensors(shape: tuple[int, ...], mean: float = 0.0) -> list[Tensor]:
    """x, weight, bias and the gradient of the result; channels last."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator).bfloat16() for _ in range(2))
    x, grad = ((t + m).bfloat16().to(memory_format=torch.channels_last) for t, m in ((x, mean), (grad, 0)))
    return [x, weight, bias, grad]


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 320, 8, 8), 32), ((3, 96, 5, 7), 32), ((2, 20, 3, 3), 4), ((1, 6, 1, 2), 6), ((2, 64, 40, 40), 1)],
    ids=str,
)
@pytest.mark.parametrize("mean", [0, 10])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("has_silu", [False, True])
def test_result_and_gradient_are_as_exact_as_pytorchs(
    shape: tuple[int, ...], groups: int, mean: float, threads: int, has_silu: bool
) -> None:
    behind = F.silu if has_silu else torch.Tensor.clone
    x, weight, bias, grad = tensors(shape, mean)
    exact = x.double().requires_grad_()
    y = behind(F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5))
    right = [y, *torch.autograd.grad(y, exact, grad.double())]
    x.requires_grad_()
    y = behind(F.group_norm(x, groups, weight, bias, 1e-5))
    pytorchs = [y, *torch.autograd.grad(y, x, grad)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y = group_norm(x, groups, weight, bias, 1e-5, has_silu=has_silu)
    found = [y, *torch.autograd.grad(y, x, grad)]
    torch.set_num_threads(before)
    for own, others, expected in zip(found, pytorchs, right, strict=True):
        assert own.is_contiguous(memory_format=torch.channels_last)
        assert error(own, expected) <= max(1.05 * error(others, expected), 0.003)


def test_what_is_not_ours_is_pytorchs() -> None:
    x, weight, bias, _ = tensors((2, 20, 3, 3))
    for args in (
        (x.contiguous(), weight, bias),
        (x.float(), weight.float(), bias.float()),
        (x, weight.clone().requires_grad_(), bias),
        (x, None, None),
        (x.flatten(2), weight, bias),
    ):
        normed = F.group_norm(args[0], 4, *args[1:], 1e-6)
        assert torch.equal(group_norm(args[0], 4, *args[1:], 1e-6), normed)
        assert torch.equal(group_norm(args[0], 4, *args[1:], 1e-6, has_silu=True), F.silu(normed))


def test_extreme_numbers_before_silu() -> None:
    x, weight, bias, grad = tensors((2, 20, 3, 3))
    wide = (weight.float().abs() + 1) * 1e4
    y = group_norm(x.requires_grad_(), 4, wide.bfloat16(), bias, 1e-5, has_silu=True)
    (found,) = torch.autograd.grad(y, x, grad)
    assert y.isfinite().all() and found.isfinite().all() and (y >= -0.28).all()


def test_a_gradient_in_another_layout_gives_the_same() -> None:
    x, weight, bias, grad = tensors((2, 20, 3, 3))
    x.requires_grad_()
    found = [torch.autograd.grad(group_norm(x, 4, weight, bias, 1e-5), x, g)[0] for g in (grad, grad.contiguous())]
    assert torch.equal(*found)
