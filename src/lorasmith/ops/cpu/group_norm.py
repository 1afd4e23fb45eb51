"""Group normalisation with constant weights, for pictures whose channels lie close, where we have a kernel for it.

SiLU behind it may be computed with it, so that what lies between them is not kept.

B batch, C channels, G groups, h w a picture's height and width.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.ops.cpu.build import address, library


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, has_silu: bool) -> Tensor:
        stats = x.new_empty(2, len(x), groups, dtype=torch.float32)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.options = eps, has_silu
        return _run(x, x, weight, bias, stats, *ctx.options, is_forward=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        return _run(x, grad, weight, bias, stats, *ctx.options, is_forward=False), None, None, None, None, None


def _run(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, eps: float, has_silu: bool, *, is_forward: bool
) -> Tensor:
    """g is x, or the gradient of the result; stats [2,B,G], means and inverse deviations, come from the forward run."""
    kernels = library()
    assert kernels is not None
    y = torch.empty_like(x, memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    done = kernels.group_norm(
        *map(address, (x, g, weight, bias, stats[0], stats[1], y)),
        *map(ctypes.c_int64, (batch, height * width, channels, stats.shape[2])), ctypes.c_float(eps),
        *map(ctypes.c_int, (is_forward, has_silu, torch.get_num_threads())),
    )  # fmt: skip
    if not done:
        raise MemoryError("out of memory in a group norm")
    return y


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, has_silu: bool = False
) -> Tensor:
    """What F.group_norm computes, or F.silu of that."""
    if _is_ours(x) and weight is not None and bias is not None and _is_constant(weight) and _is_constant(bias):
        return _GroupNorm.apply(x, groups, weight, bias, eps, has_silu)  # pyright: ignore[reportReturnType]
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if has_silu else y


def _is_ours(x: Tensor) -> bool:
    is_picture = x.ndim == 4 and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and is_picture and library() is not None


def _is_constant(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and not weight.requires_grad and weight.is_contiguous()
