"""h * gelu(g), forward and backward in one pass each, where we have a kernel for it (Shazeer 2020, "GLU variants")."""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.ops.cpu.build import address, library


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kernels = library()
        assert kernels is not None
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        kernels.geglu_forward(address(x), address(y), *_sizes(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        kernels = library()
        assert kernels is not None
        (x,), grad = ctx.saved_tensors, grad.contiguous()
        grad_x = torch.empty_like(x)
        kernels.geglu_backward(address(x), address(grad), address(grad_x), *_sizes(grad))
        return grad_x


def _sizes(y: Tensor) -> tuple[Any, ...]:
    width = y.shape[-1]
    return ctypes.c_int64(y.numel() // width), ctypes.c_int64(width), ctypes.c_int(torch.get_num_threads())


def geglu(x: Tensor) -> Tensor:
    """x [..., 2 n], halves h and g -> h * gelu(g) [..., n]."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() and library() is not None:
        return _GEGLU.apply(x)  # pyright: ignore[reportReturnType]
    hidden, gate = x.chunk(2, -1)
    return hidden * F.gelu(gate)
