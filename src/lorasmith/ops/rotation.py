"""Block-diagonal products on a layer's output: z + z E, with z = y - bias cut into blocks.

n blocks of s numbers; J, what is made of neighbours, of w = n s / J numbers each; N rows.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.ops.block_diagonal import joined, parted, together
from lorasmith.ops.cpu.build import address, kernels
from lorasmith.ops.im2col import image_of, rows_of

LANES = 16
"""The numbers that our own kernel takes at a time."""


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, turn: Tensor, bias: Tensor | None, is_conv: bool) -> Tensor:
        ctx.save_for_backward(y, turn, bias)
        ctx.is_conv = is_conv
        return _like(_turned(_rows(y, is_conv), turn, bias), y, is_conv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, turn, bias = ctx.saved_tensors
        rows, wants_y = _rows(grad, ctx.is_conv), ctx.needs_input_grad[0]
        grad_y, grad_turn = _gradients(rows, _rows(y, ctx.is_conv), turn, bias, wants_y)
        return None if grad_y is None else _like(grad_y, y, ctx.is_conv), grad_turn, None, None


def _turned(y: Tensor, turn: Tensor, bias: Tensor | None) -> Tensor:
    """y [N, n s] -> the same turned."""
    if (library := _ours(y, turn)) is not None:
        out = torch.empty_like(y)
        _run(library.rotation_forward, y, (y,), turn, bias, (out,))
        return out
    wide = _wide(turn)
    return _plus(y, _unbiased(y, wide, bias), wide)


def _gradients(
    grad: Tensor, y: Tensor, turn: Tensor, bias: Tensor | None, wants_y: bool
) -> tuple[Tensor | None, Tensor]:
    """grad and y [N, n s] -> the gradients of y, if wanted, and turn."""
    if grad.dtype == y.dtype and (library := _ours(y, turn)) is not None:
        grad_y, grad_turn = torch.empty_like(grad), torch.empty_like(turn, dtype=torch.float32)
        _run(library.rotation_backward, y, (grad, y), turn, bias, (grad_y, grad_turn))
        return grad_y, grad_turn.to(turn.dtype)
    wide = _wide(turn)
    blocks = _cut(grad.to(turn.dtype), wide).contiguous()
    grad_wide = torch.bmm(_unbiased(y, wide, bias).mT, blocks)
    return _plus(grad, blocks, wide.mT) if wants_y else None, parted(grad_wide, len(turn) // len(wide))


def _ours(y: Tensor, turn: Tensor) -> ctypes.CDLL | None:
    """The library, where it has a kernel for these: bf16 rows on the processor, in blocks that fill its vectors."""
    fits = y.shape[1] % LANES == 0 == LANES % turn.shape[1]
    return kernels() if fits and y.dtype == torch.bfloat16 and y.device.type == "cpu" else None


def _run(
    kernel: Callable[..., int], y: Tensor, inputs: Sequence[Tensor], turn: Tensor, bias: Tensor | None,
    results: Sequence[Tensor],
) -> None:  # fmt: skip
    turn = turn.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    sizes = *map(ctypes.c_int64, (*y.shape, turn.shape[1])), ctypes.c_int(torch.get_num_threads())
    if not kernel(*map(address, (*inputs, turn, bias, *results)), *sizes):
        raise MemoryError("out of memory in a layer's rotation")


def _rows(y: Tensor, is_conv: bool) -> Tensor:
    """y [..., n s] or [B, n s, …] -> [N, n s], in one piece; a view where the channels lie last."""
    return (rows_of(y) if is_conv else y.reshape(-1, y.shape[-1])).contiguous()


def _like(rows: Tensor, y: Tensor, is_conv: bool) -> Tensor:
    """The rows of y -> y's shape, a view."""
    return image_of(rows.view(y.movedim(1, -1).shape)) if is_conv else rows.view(y.shape)


def _wide(turn: Tensor) -> Tensor:
    """turn [n, s, s] -> [J, w, w]."""
    return joined(turn, together(len(turn), turn.shape[1]))


def _cut(y: Tensor, wide: Tensor) -> Tensor:
    """y [N, n s] -> [J, N, w], a view."""
    return y.view(len(y), len(wide), -1).transpose(0, 1)


def _unbiased(y: Tensor, wide: Tensor, bias: Tensor | None) -> Tensor:
    """y - bias [N, n s] -> [J, N, w], each block in one piece, in the dtype of wide."""
    y = y.to(wide.dtype)
    return _cut(y if bias is None else y - bias.to(wide.dtype), wide).contiguous()


def _plus(y: Tensor, blocks: Tensor, wide: Tensor) -> Tensor:
    """y [N, n s] + blocks [J, N, w] wide [J, w, w], in y's dtype."""
    if y.dtype != wide.dtype:
        return y + torch.bmm(blocks, wide).transpose(0, 1).reshape(y.shape).to(y.dtype)
    out = y.clone()
    _cut(out, wide).baddbmm_(blocks, wide)
    return out


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        turn = torch.linalg.solve(eye - q, 2 * q)
        ctx.save_for_backward(turn)
        return turn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (turn,) = ctx.saved_tensors
        inverse = (turn / 2 + torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)).mT
        return 2 * (inverse @ grad @ inverse)


def cayley(q: Tensor) -> Tensor:
    """q [n, s, s], q^T = -q -> R - I = 2 (I - q)^-1 q, without a difference of near equals, for R = (I + q)(I - q)^-1.

    With M = (I - q)^-1 = I + (R - I) / 2, its change is 2 M dq M: the backward pass solves nothing.
    """
    return _Cayley.apply(q)  # pyright: ignore[reportReturnType]


def rotated(y: Tensor, turn: Tensor, bias: Tensor | None, is_conv: bool) -> Tensor:
    """y [..., n s] or [B, n s, …], turn [n, s, s], bias [n s], which gets no gradient -> y + (y - bias) turn."""
    return _Rotated.apply(y, turn, bias, is_conv)  # pyright: ignore[reportReturnType]
