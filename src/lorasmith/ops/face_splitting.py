"""The products of all pairs of rows of two matrices (face-splitting products: Slyusar 1999), and their gradients."""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.ops.cpu.build import address, kernels, library

MOST = 128
"""The most rows that our own kernel takes."""


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        found = library()
        assert found is not None
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        out = a.new_empty(len(a) * len(b), a.shape[1])
        found.pairs_forward(*map(address, (a, b, out)), *_sizes(a, b))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        found = library()
        assert found is not None
        (a, b), grad = ctx.saved_tensors, grad.contiguous()
        grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
        found.pairs_backward(*map(address, (grad, a, b, grad_a, grad_b)), *_sizes(a, b))
        return grad_a, grad_b


def _sizes(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return *map(ctypes.c_int64, (len(a), len(b), a.shape[1])), ctypes.c_int(torch.get_num_threads())


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """a [r, n], b [s, n] -> [r s, n]; our own kernel where there is one for it: bf16 on the processor."""
    is_ours = {a.dtype, b.dtype} == {torch.bfloat16} and a.device.type == b.device.type == "cpu" and len(b) <= MOST
    if is_ours and kernels() is not None:
        return _Pairs.apply(a, b)  # pyright: ignore[reportReturnType]
    return (a[:, None] * b).flatten(0, 1)
