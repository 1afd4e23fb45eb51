"""A gain for each output of a layer, and its gradients; in one pass over the numbers where a kernel of our own does it.

y [..., n] with axis -1, or [B, n, …] with axis 1; gain and bias [n], the gain in float32 or wider.
"""

import ctypes

import torch
from torch import Tensor

from lorasmith.ops.cpu.build import address, kernels


def gained(y: Tensor, gain: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """y + gain (y - bias), a new tensor."""
    if _is_ours(y, gain, axis) and (library := kernels()) is not None:
        out = torch.empty_like(y)
        bias = None if bias is None else bias.to(gain.dtype)
        library.gain_forward(*map(address, (y, gain, bias, out)), *_sizes(y, gain))
        return out
    out = torch.addcmul(y, y, _along(gain, y, axis))
    return out if bias is None else out.sub_(_along(gain * bias, y, axis))


def gained_gradients(grad: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
    """The gradient of y, and the sums [n] of grad (y - bias), in the gain's dtype."""
    if _is_ours(y, gain, axis) and _is_ours(grad, gain, axis) and (library := kernels()) is not None:
        grad_y, total = torch.empty_like(grad), torch.empty_like(gain)
        bias = None if bias is None else bias.to(gain.dtype)
        if not library.gain_backward(*map(address, (grad, y, gain, bias, grad_y, total)), *_sizes(y, gain)):
            raise MemoryError("out of memory in the backward pass of a layer's gain")
        return grad_y, total
    axes = [other for other in range(grad.ndim) if other != axis % grad.ndim]
    wide = grad.to(gain.dtype) if grad.dtype == torch.float16 else grad  # whose sums may be beyond its range
    total = (wide * y).sum(axes).to(gain.dtype)
    if bias is not None:
        total -= wide.sum(axes).to(gain.dtype) * bias
    return torch.addcmul(grad, grad, _along(gain, grad, axis)), total


def _is_ours(y: Tensor, gain: Tensor, axis: int) -> bool:
    in_rows = y.dtype == torch.bfloat16 and gain.dtype == torch.float32 and y.movedim(axis, -1).is_contiguous()
    return in_rows and y.device.type == "cpu" and gain.is_contiguous()


def _sizes(y: Tensor, gain: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, ctypes.c_int]:
    rows = y.numel() // len(gain)
    return ctypes.c_int64(rows), ctypes.c_int64(len(gain)), ctypes.c_int(torch.get_num_threads())


def _along(values: Tensor, y: Tensor, axis: int) -> Tensor:
    """values [n] -> what multiplies y along its axis, in y's dtype."""
    return values.to(y.dtype).view(-1, *[1] * (y.ndim - 1 - axis % y.ndim))
