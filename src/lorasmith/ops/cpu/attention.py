"""Attention in bf16 by our own kernels, on processors whose products of bf16 PyTorch makes little use of.

B batch, H heads, N queries, M keys, D width of a head.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasmith.ops.cpu.build import View, address, in_use, library

MAX_WIDTH = 256


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = _RUNS.results_of(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *gradients(grad, q, k, v, out, lse, ctx.scale), None


Results = tuple[Tensor, Tensor]
"""What attended gives."""


class _Runs(threading.local):
    """What the first run of a checkpoint computed, for its second run. Nobody can write into it: autograd forbids."""

    kept: deque[Results] | None = None
    is_second = False

    def results_of(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Results:
        if self.kept and self.is_second:
            return self.kept.popleft()
        out, lse = attended(q, k, v, scale)
        if self.kept is not None and not self.is_second:
            self.kept.append((out.detach(), lse))
        return out, lse

    @contextmanager
    def using(self, kept: deque[Results], *, is_second: bool) -> Iterator[None]:
        before = self.kept, self.is_second
        self.kept, self.is_second = kept, is_second
        try:
            yield
        finally:
            self.kept, self.is_second = before


_RUNS = _Runs()


def kept_results() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of both runs of a checkpoint, whose second one takes attention's results from the first.

    They are the costliest to compute again, and as small as what a block is given.
    """
    kept: deque[Results] = deque()
    return _RUNS.using(kept, is_second=False), _RUNS.using(kept, is_second=True)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Results:
    """q [B,H,N,D], k and v [B,H,M,D] -> the attention's result [B,H,N,D] and lse [B,H,N].

    The result lies as [B,N,H,D]; lse, in float32, is the logarithm of each query's sum of exponentials. By blocks (Dao
    et al. 2022, "FlashAttention", algorithm 1).
    """
    kernels = library()
    assert kernels is not None
    out, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _run(kernels.attention_forward, (q, k, v), (out,), lse, scale)
    return out, lse


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q [B,H,N,D], k and v [B,H,M,D], for attended's out and lse, by blocks (algorithm 4)."""
    kernels = library()
    assert kernels is not None
    grads = _like(q), _like(k), _like(v)
    _run(kernels.attention_backward, (q, k, v, out, grad), grads, lse, scale)
    return grads


def _run(
    kernel: Callable[..., int], inputs: tuple[Tensor, ...], results: tuple[Tensor, ...], lse: Tensor, scale: float
) -> None:
    """Runs a kernel on (q, k, …); lse [B,H,N] lies close."""
    (batch, heads, num_queries, width), num_keys = inputs[0].shape, inputs[1].shape[2]
    close = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]  # kept until the kernel has run
    done = kernel(
        *map(View.of, close), address(lse), *map(View.of, results),
        *map(ctypes.c_int64, (batch, heads, num_queries, num_keys, width)), ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    if not done:
        raise MemoryError("out of memory in attention")


def _like(x: Tensor) -> Tensor:
    """An empty tensor [B,H,…,D] that lies as [B,…,H,D]."""
    batch, heads, rows, width = x.shape
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)


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
        plain = attn_mask is None and not dropout_p and not is_causal and (scale is None or scale > 0)
        if plain and is_ours(query, key, value):
            return _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)  # pyright: ignore[reportReturnType]
        return self.plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def is_ours(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the attention of these can be our own."""
    return (
        {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        and {q.device.type, k.device.type, v.device.type} == {"cpu"}
        and q.ndim == 4
        and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])
        and q.shape[3] <= MAX_WIDTH
        and min(*q.shape, k.shape[2]) > 0
    )


_SWITCH = _Switch()


@contextmanager
def fast_attention() -> Iterator[None]:
    """F.scaled_dot_product_attention is our own as long as this is open, where that can be."""
    if library() is None:
        yield
        return
    _SWITCH.turn(1)
    try:
        with in_use():
            yield
    finally:
        _SWITCH.turn(-1)
