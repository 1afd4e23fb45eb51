"""Updates y + scale * op(x): one autograd function that keeps x and the factors, never what is made of them.

What an update multiplies x by is built from its factors, again in the backward pass, so that neither a weight nor
anything inside the product is kept between the passes (Cherniuk et al. 2023, "Run LoRA Run", section 3, for LoRA).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Weights = Sequence[Tensor]
Build = Callable[..., Weights]
"""The factors of an update -> the weights that its operation takes."""


class Operation(Protocol):
    """A linear function of x, given by weights; immutable."""

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        """x [..., n_in] or [B, n_in, …] -> a new tensor of the layer's output shape."""
        ...

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        """The gradients of x (None unless wanted) and weights, given that of scale * run(x, weights)."""
        ...


def as_they_are(*factors: Tensor) -> Weights:
    """The factors are the weights."""
    return factors


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, operation: Operation, build: Build, scale: float, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.operation, ctx.build, ctx.scale = operation, build, scale
        weights = build(*(factor.detach() for factor in factors))  # a matrix that wants a gradient makes matmul copy
        delta = operation.run(x.to(factors[0].dtype), weights)
        # not view(): autograd refuses what changes a custom function's view in place, as an activation may
        return torch.ops.aten._unsafe_view(delta, y.shape).mul_(scale).to(y.dtype).add_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *factors = ctx.saved_tensors
        dtype = factors[0].dtype
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_() for factor in factors]
            weights = ctx.build(*leaves)
        plain = [weight.detach() for weight in weights]
        grad_x, grad_weights = ctx.operation.gradients(
            grad.to(dtype), x.to(dtype), plain, ctx.scale, ctx.needs_input_grad[0]
        )
        if grad_x is not None:
            grad_x = grad_x.reshape(x.shape).to(x.dtype)
        if ctx.build is not as_they_are:
            grad_weights = torch.autograd.grad(weights, leaves, grad_weights)
        return grad_x, grad, None, None, None, *grad_weights


def updated(
    x: Tensor, y: Tensor, operation: Operation, factors: Sequence[Tensor], scale: float, build: Build = as_they_are
) -> Tensor:
    """y + scale * operation.run(x, build(*factors)), computed in the factors' dtype, in y's dtype."""
    return _Updated.apply(x, y, operation, build, scale, *factors)  # pyright: ignore[reportReturnType]
