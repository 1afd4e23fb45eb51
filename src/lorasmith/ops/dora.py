"""Layers whose rows are given new lengths: (m / n) (z + scale up(down(x))) + bias, with z = y - bias.

n, the rows' lengths with the update, is a constant of the backward pass (Liu et al. 2024, "DoRA", section 4.3). It
comes from products with the factors, so that W + scale up down is never made. r rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.ops.additive import Base, Operation, Weights, run_of, with_gradients, with_run
from lorasmith.ops.output_gain import gained, gained_gradients

SMALLEST = 1e-30
"""The least square of a length, so that a row of zeros can be divided by its own."""


def lengths_of(squares: Tensor) -> Tensor:
    """Roots, by a power: on processors PyTorch's sqrt wakes the threads of another library, at 0.1 ms a call."""
    return squares.pow(0.5)


def row_norms(squares: Tensor, products: Tensor, weights: Weights, scale: float) -> Tensor:
    """The lengths [n_out] of the rows of W + scale up down, in float32 or wider.

    squares [n_out]: those of W's rows; products [r, n_out]: down W^T; weights: down [r, …], up [n_out, r, …]. By rows,
    |W + s U D|^2 = |W|^2 + (2 s W D^T + s^2 U D D^T) * U, summed.
    """
    down, up = (weight.detach().flatten(1).to(squares.dtype) for weight in weights)
    crossed = torch.addmm(products.to(squares.dtype), down @ down.t(), up.t(), beta=2 * scale, alpha=scale**2)
    return lengths_of((squares + (crossed * up.t()).sum(0)).clamp_(min=SMALLEST))


class _Decomposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor | Base, bias: Tensor | None, operation: Operation, scale: float,
        norms: Tensor, lengths: Tensor, down: Tensor, up: Tensor, change: Tensor,
    ) -> Tensor:  # fmt: skip
        gain = (lengths + change.detach() - norms) / norms  # m / n - 1, which a dtype of 16 bits holds as it is small
        ctx.base, x, y = run_of(base, x)
        ctx.operation, ctx.scale = operation, scale
        weights = down.detach(), _scaled(up.detach(), scale * (1 + gain))
        out, kept = with_run(gained(y, gain, bias, _axis(up)), operation, x, weights, 1.0)
        ctx.save_for_backward(x, y, kept, bias, norms, gain, down, up, change)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, kept, bias, norms, gain, down, up, change = ctx.saved_tensors
        scales = ctx.scale * (1 + gain)
        if ctx.base is not None:
            grad = ctx.base.arranged(grad)
        grad_y, total = gained_gradients(grad, y, gain, bias, _axis(up))
        grad_x = ctx.base.input_gradient(grad_y, x.shape) if ctx.base is not None and ctx.needs_input_grad[0] else None
        grad_x, (grad_down, grad_up) = with_gradients(
            grad_x, ctx.operation, grad, x, (down.detach(), _scaled(up.detach(), scales)), 1.0,
            ctx.needs_input_grad[0], kept,
        )  # fmt: skip
        # what m / n multiplies, times the gradient: the update's part is up's gradient, already summed
        total += ctx.scale * (grad_up.to(total.dtype) * up.detach()).flatten(1).sum(1)
        factors = grad_down, _scaled(grad_up, scales), (total / norms).to(change.dtype)
        return grad_x, grad_y if ctx.base is None else None, None, None, None, None, None, *factors


def _axis(up: Tensor) -> int:
    """Where the outputs are in a layer's output."""
    return -1 if up.ndim == 2 else 1


def _scaled(up: Tensor, factors: Tensor) -> Tensor:
    """up [n_out, r, 1…], each row times its factor [n_out], in up's dtype."""
    return (up * factors.view(-1, *[1] * (up.ndim - 1))).to(up.dtype)


def decomposed(
    x: Tensor, base: Tensor | Base, bias: Tensor | None, operation: Operation, factors: tuple[Tensor, Tensor, Tensor],
    *, scale: float, norms: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    """x [..., n_in] or [B, n_in, …] -> base, the layer's output or what makes it, with the update, in its dtype.

    bias [n_out]: the layer's, which its output holds; factors: down and up, as `operation` takes them, and change
    [n_out]: m = lengths + change; norms, lengths [n_out]: those of the rows with and without the update, constants.
    """
    return _Decomposed.apply(  # pyright: ignore[reportReturnType]
        x, base, bias, operation, scale, norms, lengths, *factors
    )
