"""Products with a weight up down of low rank, in two steps. r rank, g groups, k… the kernel's axes.

The inner product h = down(x) is kept for the backward pass where it is small beside x, and computed again where it is
not. Products are arranged so that the rank comes first, which matrix libraries are fast at.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.additive import Operation, Weights
from lorasmith.ops.conv import ConvShape
from lorasmith.ops.im2col import Taps, has_channels_last, image_of, rows_of


@dataclass(frozen=True)
class LowRankLinear(Operation):
    """x [..., n_in], weights (down [r, n_in], up [n_out, r]) -> x down^T up^T [..., n_out]."""

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        down, up = weights
        return F.linear(F.linear(x, down), up)

    def add_run(self, y: Tensor, x: Tensor, weights: Weights, scale: float) -> Tensor | None:
        if not y.is_contiguous():
            return super().add_run(y, x, weights, scale)
        down, up = weights
        h = F.linear(_rows(x), down)
        _rows(y).addmm_(h, up.t(), alpha=scale)
        return _small(h, x)

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        grad_h, grads = _inner_gradient(_rows(grad), _rows(x), weights, scale, None)
        return grad_h @ weights[0] if wants_x else None, grads

    def add_gradients(
        self, grad_x: Tensor, grad: Tensor, x: Tensor, weights: Weights, scale: float, kept: Tensor | None = None
    ) -> Weights:
        if not grad_x.is_contiguous():
            return super().add_gradients(grad_x, grad, x, weights, scale, kept)
        grad_h, grads = _inner_gradient(_rows(grad), _rows(x), weights, scale, kept)
        _rows(grad_x).addmm_(grad_h, weights[0])
        return grads


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _small(h: Tensor, x: Tensor) -> Tensor | None:
    """h, where it is small enough beside x to be kept."""
    return h if h.numel() * SMALL <= x.numel() else None


def _inner_gradient(
    grad: Tensor, x: Tensor, weights: Weights, scale: float, h: Tensor | None
) -> tuple[Tensor, Weights]:
    """grad [N, n_out], x [N, n_in], h [N, r] or None -> the gradients of h and of down and up."""
    down, up = weights
    grad_h, grad_up = _through_up(grad, F.linear(x, down) if h is None else h, up, scale)
    return grad_h, (_gathered(grad_h, x), grad_up)


def _through_up(grad: Tensor, h: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """grad [N, n_out], h [N, r], up [n_out, r] -> the gradients of h and up."""
    grad_up = _gathered(h, grad).t()
    return F.linear(grad, (up.t() * scale).contiguous()), grad_up if scale == 1 else grad_up * scale


def _gathered(h: Tensor, rows: Tensor) -> Tensor:
    """h [N, r], rows [N, n] -> h^T rows [r, n]."""
    return (h.t().contiguous() if rows.shape[1] >= WIDE else h.t()) @ rows


WIDE = 1024
"""From how many columns on a product is faster by more than it takes to transpose its thin factor first."""

SMALL = 4
"""How many times x's numbers must be an inner product's for that to be kept."""

MOST_SPREAD = 2**19
"""The most numbers that a gradient is copied to for one product: as many as stay in a processor's cache."""


@dataclass(frozen=True)
class LowRankConv(Operation):
    """x [B, n_in, …], weights (down [r, n_in / g, k…], up [n_out, r, 1…]) -> x with the weight up down [B, n_out, …].

    With g groups, the weight of group j is up_j down: the groups share `down` and each has its rows of `up`. So down
    runs over x [B g, n_in / g, …], and up multiplies h [B, g, r, positions]. Without groups, where the channels lie
    last in memory, up multiplies rows, and so does down's gradient while what it takes for that is small.
    """

    shape: ConvShape

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        down, up = weights
        if self._has_rows(x):
            return image_of(F.linear(self._inner(x, down), up.flatten(1)))
        h = self.shape.run(self._split(x), down)
        delta = self._up_rows(up) @ h.reshape(len(x), self.shape.groups, h.shape[1], -1)
        return delta.view(len(x), -1, *h.shape[2:])

    def add_run(self, y: Tensor, x: Tensor, weights: Weights, scale: float) -> Tensor | None:
        if not (self._has_rows(x) and has_channels_last(y)):
            return super().add_run(y, x, weights, scale)
        down, up = weights
        h = self._inner(x, down)
        rows_of(y).addmm_(h.flatten(0, -2), up.flatten(1).t(), alpha=scale)
        return _small(h, x)

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        down, up = weights
        if self._has_rows(x):
            grad_h, grad_up = self._row_gradients(grad, x, weights, scale, None)
            grad_x, grad_down = self.shape.gradients(image_of(grad_h), x, down, wants_x)
            return grad_x, (grad_down, grad_up)
        groups, split = self.shape.groups, self._split(x)
        h = self.shape.run(split, down)
        rows = grad.reshape(len(x), groups, grad.shape[1] // groups, -1)
        grad_up = (h.reshape(len(x), groups, h.shape[1], -1) @ rows.mT).sum(0).mT.reshape(up.shape) * scale
        grad_h = (self._up_rows(up).mT @ rows).view(h.shape) * scale
        grad_x, grad_down = self.shape.gradients(grad_h, split, down, wants_x)
        return grad_x, (grad_down, grad_up)

    def add_gradients(
        self, grad_x: Tensor, grad: Tensor, x: Tensor, weights: Weights, scale: float, kept: Tensor | None = None
    ) -> Weights:
        down = weights[0]
        taps = Taps(self.shape, tuple(down.shape[2:]), tuple(x.shape[2:]))
        if not (self._has_rows(x) and has_channels_last(grad_x)) or len(down) * taps.reach(x) > MOST_SPREAD:
            return super().add_gradients(grad_x, grad, x, weights, scale, kept)
        grad_h, grad_up = self._row_gradients(grad, x, weights, scale, kept)
        spread = taps.spread(grad_h)
        rows_of(grad_x).addmm_(spread, taps.matrix_of(down))
        return taps.kernel_of(_gathered(spread, rows_of(x)), down.shape), grad_up

    def _has_rows(self, x: Tensor) -> bool:
        return self.shape.groups == 1 and has_channels_last(x)

    def _inner(self, x: Tensor, down: Tensor) -> Tensor:
        """x -> h [B, …, r]."""
        if self.shape.is_pointwise(tuple(down.shape[2:])):
            return F.linear(x.movedim(1, -1), down.flatten(1))
        h = self.shape.run(x, down.contiguous(memory_format=torch.channels_last) if down.ndim == 4 else down)
        return h.movedim(1, -1).contiguous()

    def _row_gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of h [B, …, r], which may be kept, and up."""
        down, up = weights
        h = self._inner(x, down) if kept is None else kept
        grad_h, grad_up = _through_up(rows_of(grad), h.flatten(0, -2), up.flatten(1), scale)
        return grad_h.view(h.shape), grad_up.view(up.shape)

    def _split(self, x: Tensor) -> Tensor:
        """x [B, n_in, …] -> [B g, n_in / g, …]."""
        groups = self.shape.groups
        return x if groups == 1 else x.reshape(len(x) * groups, -1, *x.shape[2:])

    def _up_rows(self, up: Tensor) -> Tensor:
        """up [n_out, r, 1…] -> [g, n_out / g, r]."""
        return up.reshape(self.shape.groups, -1, up.shape[1])
