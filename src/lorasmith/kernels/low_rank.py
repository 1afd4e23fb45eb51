"""Fused low-rank updates y + scale * up(down(x)): autograd functions that keep x alone for the backward pass.

The inner product h = down(x) is computed again instead of kept (Cherniuk et al. 2023, "Run LoRA Run", section 3): at
rank r it costs r / n_out of the layer's own product. Products are arranged so that the rank is never the last axis of a
result, which matrix libraries are slow at. r rank, g groups, k… the kernel's axes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, down, up)
        ctx.scale = scale
        h = F.linear(x.to(down.dtype), down)
        return F.linear(h, up).mul_(scale).to(y.dtype).add_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up = ctx.saved_tensors
        rows = x.to(down.dtype).flatten(0, -2)
        grad_rows = grad.to(down.dtype).flatten(0, -2)
        grad_h = F.linear(grad_rows, up.t().contiguous()) * ctx.scale
        grad_x = (grad_h @ down).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_up = (F.linear(rows, down).t() @ grad_rows).t().contiguous() * ctx.scale
        return grad_x, grad, grad_h.t() @ rows, grad_up, None


def low_rank_linear(x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """x [..., n_in], y [..., n_out], down [r, n_in], up [n_out, r] -> y + scale * x down^T up^T, in y's dtype."""
    return _LowRankLinear.apply(x, y, down, up, scale)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class ConvShape:
    """How a convolution of any number of axes runs over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def num_axes(self) -> int:
        return len(self.stride)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, n_in, …], weight [r, n_in, k…] -> [B, r, …]; the groups are the caller's business."""
        return torch.convolution(
            x, weight, None, self.stride, self.padding, self.dilation, False, (0,) * self.num_axes, 1
        )

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool) -> tuple[Tensor | None, Tensor]:
        """The gradients of x (None unless wanted) and weight of run(x, weight), given that of its result."""
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0,) * self.num_axes, 1,
            (wants_x, True, False),
        )  # fmt: skip
        return grad_x, grad_weight


def _up_rows(up: Tensor, groups: int) -> Tensor:
    """up [n_out, r, 1…] -> [g, n_out / g, r]."""
    return up.reshape(groups, -1, up.shape[1])


class _LowRankConv(torch.autograd.Function):
    """With g groups, the delta of group j is up_j down: the groups share `down` and each has its rows of `up`.

    So down runs over x [B g, n_in / g, …], and up multiplies h [B, g, r, positions].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: float, shape: ConvShape) -> Tensor:
        ctx.save_for_backward(x, down, up)
        ctx.scale, ctx.shape = scale, shape
        h = shape.run(_split(x.to(down.dtype), shape.groups), down)
        delta = _up_rows(up, shape.groups) @ h.reshape(len(x), shape.groups, h.shape[1], -1)
        return delta.view(y.shape).mul_(scale).to(y.dtype).add_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up = ctx.saved_tensors
        groups = ctx.shape.groups
        split = _split(x.to(down.dtype), groups)
        h = ctx.shape.run(split, down)
        rows = grad.to(down.dtype).reshape(len(x), groups, grad.shape[1] // groups, -1)
        grad_up = (h.reshape(len(x), groups, h.shape[1], -1) @ rows.mT).sum(0).mT.reshape(up.shape) * ctx.scale
        grad_h = (_up_rows(up, groups).mT @ rows).view(h.shape) * ctx.scale
        grad_x, grad_down = ctx.shape.gradients(grad_h, split, down, ctx.needs_input_grad[0])
        if grad_x is not None:
            grad_x = grad_x.reshape(x.shape).to(x.dtype)
        return grad_x, grad, grad_down, grad_up, None, None


def _split(x: Tensor, groups: int) -> Tensor:
    """x [B, n_in, …] -> [B g, n_in / g, …]."""
    return x if groups == 1 else x.reshape(len(x) * groups, -1, *x.shape[2:])


def low_rank_conv(x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: float, shape: ConvShape) -> Tensor:
    """x [B, n_in, …], y [B, n_out, …], down [r, n_in / g, k…], up [n_out, r, 1…] -> adapted y, in y's dtype.

    The update is scale times the convolution of x with the weight up down [n_out, n_in / g, k…].
    """
    return _LowRankConv.apply(x, y, down, up, scale, shape)  # pyright: ignore[reportReturnType]
