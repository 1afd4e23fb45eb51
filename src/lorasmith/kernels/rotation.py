"""Block-diagonal products on a layer's output: z + z E, with z = y - bias cut into blocks.

n blocks of s numbers, N rows, B batch, P positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LINEAR = ("Nns,nst->Nnt", "Nnt,nst->Nns", "Nns,Nnt->nst")
CONV = ("BnsP,nst->BntP", "BntP,nst->BnsP", "BnsP,BntP->nst")


def _blocks(y: Tensor, num_blocks: int, is_conv: bool) -> Tensor:
    """y [..., n s] -> [N, n, s]; of a convolution, y [B, n s, …] -> [B, n, s, P]."""
    if is_conv:
        return y.reshape(len(y), num_blocks, y.shape[1] // num_blocks, -1)
    return y.reshape(-1, num_blocks, y.shape[-1] // num_blocks)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, turn: Tensor, bias: Tensor | None, is_conv: bool) -> Tensor:
        ctx.save_for_backward(y, turn, bias)
        ctx.is_conv = is_conv
        delta = torch.einsum((CONV if is_conv else LINEAR)[0], _unbiased(y, turn, bias, is_conv), turn)
        return delta.reshape(y.shape).to(y.dtype) + y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, turn, bias = ctx.saved_tensors
        _, back, pairs = CONV if ctx.is_conv else LINEAR
        grad_blocks = _blocks(grad.to(turn.dtype), len(turn), ctx.is_conv)
        grad_turn = torch.einsum(pairs, _unbiased(y, turn, bias, ctx.is_conv), grad_blocks)
        grad_y = None
        if ctx.needs_input_grad[0]:
            grad_y = torch.einsum(back, grad_blocks, turn).reshape(y.shape).to(y.dtype) + grad
        return grad_y, grad_turn, None, None


def _unbiased(y: Tensor, turn: Tensor, bias: Tensor | None, is_conv: bool) -> Tensor:
    """y - bias in blocks, in the dtype of turn."""
    if bias is not None:
        y = y - bias.to(y.dtype).view(-1, *[1] * (y.ndim - 2 if is_conv else 0))
    return _blocks(y.to(turn.dtype), len(turn), is_conv)


def rotated(y: Tensor, turn: Tensor, bias: Tensor | None, is_conv: bool) -> Tensor:
    """y [..., n s] or [B, n s, …], turn [n, s, s], bias [n s], which gets no gradient -> y + (y - bias) turn."""
    return _Rotated.apply(y, turn, bias, is_conv)  # pyright: ignore[reportReturnType]
