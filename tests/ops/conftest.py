"""What is asked of every operation beside the same sum in plain torch, and the convolutions it is asked for."""

from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.ops.additive import Operation, updated
from lorasmith.ops.conv import ConvShape
from lorasmith.ops.low_rank import SMALL

SCALE = 0.7
CONVS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    nn.Conv2d(4, 6, 1),
    nn.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
]
GROUPED = [nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 8, 1, groups=4)]

Plain = Callable[..., Tensor]
"""(x, *weights) -> what the operation makes of them."""


class Check(Protocol):
    def __call__(self, operation: Operation, plain: Plain, x: Tensor, *weights: Tensor) -> None: ...


class Conv:
    """A convolution's shape, and its run with any weight."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.shape = ConvShape(layer.stride, layer.padding, layer.dilation, layer.groups)
        self.x = random(2, layer.in_channels, *(6, 5, 4)[: len(layer.kernel_size)])
        self.kernel = layer.kernel_size
        self.ones = [1] * len(self.kernel)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        run = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        layer = self.layer
        return run(x, weight.view(layer.weight.shape), None, layer.stride, layer.padding, layer.dilation, layer.groups)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(3**i * size for i, size in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def fused_is_plain(operation: Operation, plain: Plain, x: Tensor, *weights: Tensor) -> None:
    delta = plain(x, *weights)
    y = random(*delta.shape)
    torch.testing.assert_close(updated(x, y, operation, weights, SCALE), y + SCALE * delta)


def gradients(operation: Operation, plain: Plain, x: Tensor, *weights: Tensor) -> None:
    inputs = (x, random(*plain(x, *weights).shape), *weights)
    assert torch.autograd.gradcheck(
        lambda x, y, *weights: updated(x, y, operation, weights, SCALE), inputs, fast_mode=True
    )


def x_without_gradient(operation: Operation, plain: Plain, x: Tensor, *weights: Tensor) -> None:
    y = random(*plain(x, *weights).shape)
    grad_x, grad_weights = operation.gradients(y, x, weights, SCALE, False)
    assert grad_x is None
    expected = torch.autograd.grad(SCALE * plain(x, *weights), weights, y)
    torch.testing.assert_close(tuple(grad_weights), expected)


def little_but_x_and_weights_kept(operation: Operation, plain: Plain, x: Tensor, *weights: Tensor) -> None:
    """Not even where x is computed with in another dtype; what else is kept is small beside x."""
    y = random(*plain(x, *weights).shape)
    for dtype in (torch.float64, torch.float32):
        x, y, kept = leaf(x.to(dtype)), leaf(y.to(dtype)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            updated(x, y, operation, weights, SCALE)
        own = {t.data_ptr() for t in (x, *weights)}
        assert own <= {t.data_ptr() for t in kept}
        assert SMALL * sum(t.numel() for t in kept if t.data_ptr() not in own) <= x.numel()


def any_layout(operation: Operation, plain: Plain, x: Tensor, *weights: Tensor) -> None:
    """The same numbers with the axes in another order in memory, the channels last included."""
    y = random(*plain(x, *weights).shape)

    def results(layout: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [leaf(layout(x)), leaf(layout(y)), *map(leaf, weights)]
        adapted = updated(leaves[0], leaves[1], operation, leaves[2:], SCALE)
        return adapted, *torch.autograd.grad(adapted, leaves, layout(y.detach() ** 2))

    expected = results(torch.Tensor.contiguous)
    torch.testing.assert_close(results(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)), expected)
    torch.testing.assert_close(results(lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)), expected)
    torch.testing.assert_close(results(lambda t: t.repeat_interleave(2, -1)[..., ::2]), expected)


def added_in_place(operation: Operation, plain: Plain, x: Tensor, *weights: Tensor) -> None:
    """What is added to an output, or to x's gradient, that is there already, with the channels first and last."""
    delta = SCALE * plain(x, *weights)
    grad = random(*delta.shape).detach()
    expected = torch.autograd.grad(delta, (x, *weights), grad)
    x, *weights = (t.detach() for t in (x, *weights))  # pyright: ignore[reportAssignmentType]
    for layout in (torch.Tensor.contiguous, lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)):
        y, grad_x = layout(torch.ones_like(grad)), layout(torch.ones_like(x))
        operation.add_run(y, layout(x), weights, SCALE)
        grads = operation.add_gradients(grad_x, layout(grad), layout(x), weights, SCALE)
        torch.testing.assert_close((y, grad_x, *grads), (1 + delta, 1 + expected[0], *expected[1:]))


def mixed_dtypes(operation: Operation, plain: Plain, x: Tensor, *weights: Tensor) -> None:
    """Computed in the weights' dtype, everything back in its own; errors against sums of absolute values."""
    y = random(*plain(x, *weights).shape)
    for layers, ours in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        leaves = [leaf(t.to(layers)) for t in (x, y)] + [leaf(t.to(ours)) for t in weights]
        adapted = updated(leaves[0], leaves[1], operation, leaves[2:], SCALE)
        results = (adapted, *torch.autograd.grad(adapted, leaves, y.to(layers)))
        assert [t.dtype for t in results] == [layers, *(t.dtype for t in leaves)]
        exact, bounds = (
            sums(plain, [change(t.detach().double()) for t in (*leaves, y.to(layers))])
            for change in (torch.clone, torch.abs)
        )
        for result, reference, bound in zip(results, exact, bounds, strict=True):
            assert ((result - reference).abs() <= 2**-6 * bound).all()


def sums(plain: Plain, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """x, y, weights and the gradient of adapted y -> adapted y and the gradients of x, y and weights."""
    *leaves, grad = [t.requires_grad_() for t in tensors]
    adapted = leaves[1] + SCALE * plain(leaves[0], *leaves[2:])
    return adapted, *torch.autograd.grad(adapted, leaves, grad)


@pytest.fixture(
    params=[
        fused_is_plain,
        gradients,
        x_without_gradient,
        little_but_x_and_weights_kept,
        any_layout,
        added_in_place,
        mixed_dtypes,
    ],
    ids=lambda check: check.__name__,
)
def check(request: pytest.FixtureRequest) -> Check:
    """One of the things asked of every operation."""
    return request.param


@pytest.fixture(params=[(3, 6), (2, 3, 6), (2, 2, 3, 6)], ids=["2_axes", "3_axes", "4_axes"])
def x(request: pytest.FixtureRequest) -> Tensor:
    """The input of a linear layer of 6 numbers."""
    return random(*request.param)


@pytest.fixture(params=CONVS, ids=str)
def conv(request: pytest.FixtureRequest) -> Conv:
    return Conv(request.param)


@pytest.fixture(params=[*CONVS, *GROUPED], ids=str)
def grouped_or_not(request: pytest.FixtureRequest) -> Conv:
    return Conv(request.param)


@pytest.fixture(name="random")
def random_fixture() -> Callable[..., Tensor]:
    """(*shape) -> normal float64 numbers that want a gradient, the same ones in every test."""
    return random
