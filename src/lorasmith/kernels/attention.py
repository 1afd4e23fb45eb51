"""Attention whose backward pass is our own where PyTorch's is slow: bf16 on processors with a matrix unit.

B batch, H heads, N queries, M keys, D width of a head.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.kernels.native import View, in_use, library

MAX_WIDTH = 256
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = flash(q, k, v, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *gradients(grad, q, k, v, out, lse, ctx.scale), None


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q [B,H,N,D] and of k and v [B,H,M,D], by tiles (Dao et al. 2022, "FlashAttention", algorithm 4).

    out [B,H,N,D] is the attention's result, lse [B,H,N] the logarithm of each query's sum of exponentials, float32.
    """
    kernels = library()
    assert kernels is not None
    batch, heads, num_queries, width = q.shape
    grads = [x.new_empty(batch, x.shape[2], heads, width).transpose(1, 2) for x in (q, k, v)]
    tensors = [_close(x) for x in (q, k, v, out, grad)]
    sizes = [ctypes.c_int64(n) for n in (batch, heads, num_queries, k.shape[2], width)]
    lse = lse.contiguous()
    done = kernels.attention_backward(
        *map(View.of, tensors), ctypes.c_void_p(lse.data_ptr()), *map(View.of, grads), *sizes, ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    if not done:
        raise MemoryError("out of memory in the backward pass of attention")
    return grads[0], grads[1], grads[2]


def _close(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Switch:
    """PyTorch's function while nobody trains, ours while somebody does; results differ by rounding alone."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.plain: Callable[..., Tensor] = F.scaled_dot_product_attention

    def turn(self, change: int) -> None:
        with self.lock:
            if self.users == 0:
                self.plain = F.scaled_dot_product_attention
            self.users += change
            F.scaled_dot_product_attention = self.attention if self.users else self.plain

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """What F.scaled_dot_product_attention computes."""
        plain = attn_mask is None and not dropout_p and not is_causal
        if plain and torch.is_grad_enabled() and is_ours(query, key, value):
            return _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)  # pyright: ignore[reportReturnType]
        return self.plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def is_ours(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the backward pass of these can be our own."""
    return (
        {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        and {q.device.type, k.device.type, v.device.type} == {"cpu"}
        and q.ndim == 4
        and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])
        and 0 < q.shape[3] <= MAX_WIDTH
        and min(q.shape[0], q.shape[2], k.shape[2]) > 0
        and any(x.requires_grad for x in (q, k, v))
    )


_SWITCH = _Switch()


@contextmanager
def fast_attention() -> Iterator[None]:
    """F.scaled_dot_product_attention has the faster backward pass as long as this is open, where there is one."""
    if library() is None:
        yield
        return
    _SWITCH.turn(1)
    try:
        with in_use():
            yield
    finally:
        _SWITCH.turn(-1)
