"""Updates base(x) + scale * op(x): one autograd function that keeps x and the factors, and little of what they make.

What an update multiplies x by is built from its factors, again in the backward pass, so that no weight is kept between
the passes, and of what is inside the product only what is small beside x (Cherniuk et al. 2023, "Run LoRA Run",
section 3, for LoRA).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Weights = Sequence[Tensor]
Build = Callable[..., Weights]
"""The factors of an update -> the weights that its operation takes."""


def as_they_are(*factors: Tensor) -> Weights:
    """The factors are the weights."""
    return factors


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

    def add_run(self, y: Tensor, x: Tensor, weights: Weights, scale: float) -> Tensor | None:
        """Adds scale * run(x, weights) to y in place; returns what add_gradients may use, small beside x."""
        y.add_(self.run(x, weights).view(y.shape), alpha=scale)

    def add_gradients(
        self, grad_x: Tensor, grad: Tensor, x: Tensor, weights: Weights, scale: float, kept: Tensor | None = None
    ) -> Weights:
        """Adds the gradient of x to grad_x in place, and returns those of the weights; kept: what add_run returned."""
        own, grads = self.gradients(grad, x, weights, scale, True)
        assert own is not None
        grad_x.add_(own.view(grad_x.shape))
        return grads


class Base(Protocol):
    """A frozen layer that is run inside the function of its update."""

    def arranged(self, x: Tensor) -> Tensor:
        """x, or its gradient, in the layout that is computed in."""
        ...

    def product(self, x: Tensor) -> Tensor:
        """x -> the layer's output, a new tensor."""
        ...

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the output -> that of x, of this shape, a new tensor."""
        ...


def run_of(base: Tensor | Base, x: Tensor) -> tuple[Base | None, Tensor, Tensor]:
    """A layer's output, or the layer -> the layer, x as it computes with it, and the output."""
    if isinstance(base, Tensor):
        return None, x, base
    x = base.arranged(x)
    return base, x, base.product(x)


def with_run(
    y: Tensor, operation: Operation, x: Tensor, weights: Weights, scale: float
) -> tuple[Tensor, Tensor | None]:
    """y, a new tensor, plus scale * operation.run(x, weights), in the weights' dtype; what is kept for gradients."""
    dtype = weights[0].dtype
    if y.dtype == dtype:
        return y, operation.add_run(y, x.to(dtype), weights, scale)
    return y.add_(operation.run(x.to(dtype), weights).view(y.shape).mul_(scale)), None


def with_gradients(
    grad_x: Tensor | None, operation: Operation, grad: Tensor, x: Tensor, weights: Weights, scale: float,
    wants_x: bool, kept: Tensor | None,
) -> tuple[Tensor | None, Weights]:  # fmt: skip
    """The gradient of x through the operation, added to grad_x, a new tensor, where there is one; those of weights."""
    dtype = weights[0].dtype
    if grad_x is not None and grad_x.dtype == dtype:
        return grad_x, operation.add_gradients(grad_x, grad.to(dtype), x.to(dtype), weights, scale, kept)
    own, grads = operation.gradients(grad.to(dtype), x.to(dtype), weights, scale, wants_x)
    if own is not None:
        own = own.reshape(x.shape).to(x.dtype)
    return own if grad_x is None or own is None else grad_x.add_(own), grads


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor | Base, operation: Operation, build: Build, scale: float, *factors: Tensor
    ) -> Tensor:
        ctx.operation, ctx.build, ctx.scale = operation, build, scale
        weights = build(*(factor.detach() for factor in factors))  # a matrix that wants a gradient makes matmul copy
        ctx.base, x, y = run_of(base, x)
        y, kept = with_run(y.clone() if y is base else y, operation, x, weights, scale)
        ctx.save_for_backward(x, kept, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, kept, *factors = ctx.saved_tensors
        base, wants_x = ctx.base, ctx.needs_input_grad[0]
        if ctx.build is as_they_are:
            weights = leaves = factors
        else:
            with torch.enable_grad():
                leaves = [factor.detach().requires_grad_() for factor in factors]
                weights = ctx.build(*leaves)
        plain = [weight.detach() for weight in weights]
        grad_x = None
        if base is not None:
            grad = base.arranged(grad)
            grad_x = base.input_gradient(grad, x.shape) if wants_x else None
        grad_x, grads = with_gradients(grad_x, ctx.operation, grad, x, plain, ctx.scale, wants_x, kept)
        if ctx.build is not as_they_are:
            grads = torch.autograd.grad(weights, leaves, grads)
        return grad_x, grad if base is None else None, None, None, None, *grads


def updated(
    x: Tensor,
    base: Tensor | Base,
    operation: Operation,
    factors: Sequence[Tensor],
    scale: float,
    build: Build = as_they_are,
) -> Tensor:
    """base, a layer's output or what makes it of x, plus scale * operation.run(x, build(*factors)).

    The update is computed in the factors' dtype, the sum is in the base's.
    """
    return _Updated.apply(x, base, operation, build, scale, *factors)  # pyright: ignore[reportReturnType]
