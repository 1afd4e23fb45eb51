"""Fused updates against plain ones built from torch's layers: values, gradients, dtypes, and what they keep."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.kernels.low_rank import ConvShape, low_rank_conv, low_rank_linear

CONVS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 8, 1, groups=4),
    nn.Conv3d(4, 6, 3, stride=(1, 2, 2), padding=1),
]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def shape_of(conv: Any) -> ConvShape:
    return ConvShape(conv.stride, conv.padding, conv.dilation, conv.groups)


def parts(conv: Any, rank: int = 3) -> tuple[Tensor, ...]:
    """x, y, down and up for this convolution."""
    axes = len(conv.kernel_size)
    x = random(2, conv.in_channels, *(6, 7, 5)[:axes])
    y = random(*conv.double()(x).shape)
    return (
        x,
        y,
        random(rank, conv.in_channels // conv.groups, *conv.kernel_size),
        random(conv.out_channels, rank, *[1] * axes),
    )


def test_linear_equals_two_products() -> None:
    x, y, down, up = random(2, 3, 5), random(2, 3, 4), random(2, 5), random(4, 2)
    expected = y + 0.7 * (x @ down.T @ up.T)
    torch.testing.assert_close(low_rank_linear(x, y, down, up, 0.7), expected)


def test_linear_gradients() -> None:
    inputs = (random(2, 3, 5), random(2, 3, 4), random(2, 5), random(4, 2))
    assert torch.autograd.gradcheck(lambda *a: low_rank_linear(*a, 0.7), inputs, fast_mode=True)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv_equals_the_convolution_with_the_merged_weight(conv: Any) -> None:
    x, y, down, up = parts(conv)
    delta = (up.flatten(1) @ down.flatten(1)).view(conv.weight.shape)
    run = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(conv.kernel_size) - 1]
    expected = y + 0.7 * run(x, delta, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    torch.testing.assert_close(low_rank_conv(x, y, down, up, 0.7, shape_of(conv)), expected)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv_gradients(conv: Any) -> None:
    shape = shape_of(conv)
    assert torch.autograd.gradcheck(lambda *a: low_rank_conv(*a, 0.7, shape), parts(conv), fast_mode=True)


def test_an_input_without_gradient_gets_none() -> None:
    x, y, down, up = random(2, 5).detach(), random(2, 4), random(2, 5), random(4, 2)
    low_rank_linear(x, y, down, up, 1.0).sum().backward()
    assert x.grad is None and down.grad is not None and up.grad is not None


def test_only_x_is_kept_for_the_backward_pass() -> None:
    x, y, down, up = random(64, 5), random(64, 4), random(2, 5), random(4, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_linear(x, y, down, up, 1.0)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), down.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_up_is_the_exact_identity_in_the_layers_dtype(dtype: torch.dtype) -> None:
    x, y = random(3, 5, dtype=dtype), random(3, 4, dtype=dtype)
    down, up = random(2, 5, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.bfloat16)
    adapted = low_rank_linear(x, y, down, up, 1.0)
    assert adapted.dtype == dtype and torch.equal(adapted, y)
