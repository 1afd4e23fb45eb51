"""Products with a weight up down of low rank, in two steps. r rank, g groups, k… the kernel's axes.

The inner product h = down(x) is computed again in the backward pass: at rank r it costs r / n_out of the layer's own
product. Products are arranged so that the rank comes first, which matrix libraries are fast at.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lorasmith.kernels.convolution import ConvShape
from lorasmith.kernels.taps import Taps, has_channels_last, image_of, rows_of
from lorasmith.kernels.update import Operation, Weights


@dataclass(frozen=True)
class LowRankLinear(Operation):
    """x [..., n_in], weights (down [r, n_in], up [n_out, r]) -> x down^T up^T [..., n_out]."""

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        down, up = weights
        return F.linear(F.linear(x, down), up)

    def add_run(self, y: Tensor, x: Tensor, weights: Weights, scale: float) -> None:
        if not y.is_contiguous():
            return super().add_run(y, x, weights, scale)
        down, up = weights
        _rows(y).addmm_(F.linear(_rows(x), down), up.t(), alpha=scale)

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        grad_h, grads = _inner_gradient(_rows(grad), _rows(x), weights, scale)
        return grad_h @ weights[0] if wants_x else None, grads

    def add_gradients(self, grad_x: Tensor, grad: Tensor, x: Tensor, weights: Weights, scale: float) -> Weights:
        if not grad_x.is_contiguous():
            return super().add_gradients(grad_x, grad, x, weights, scale)
        grad_h, grads = _inner_gradient(_rows(grad), _rows(x), weights, scale)
        _rows(grad_x).addmm_(grad_h, weights[0])
        return grads


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _inner_gradient(grad: Tensor, x: Tensor, weights: Weights, scale: float) -> tuple[Tensor, Weights]:
    """grad [N, n_out], x [N, n_in] -> the gradients of h [N, r] and of down and up."""
    down, up = weights
    grad_h, grad_up = _through_up(grad, F.linear(x, down), up, scale)
    return grad_h, (grad_h.t().contiguous() @ x, grad_up)


def _through_up(grad: Tensor, h: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """grad [N, n_out], h [N, r], up [n_out, r] -> the gradients of h and up."""
    return F.linear(grad, up.t().contiguous()) * scale, (h.t().contiguous() @ grad).t().contiguous() * scale


@dataclass(frozen=True)
class LowRankConv(Operation):
    """x [B, n_in, …], weights (down [r, n_in / g, k…], up [n_out, r, 1…]) -> x with the weight up down [B, n_out, …].

    With g groups, the weight of group j is up_j down: the groups share `down` and each has its rows of `up`. So down
    runs over x [B g, n_in / g, …], and up multiplies h [B, g, r, positions]. Without groups, where the channels lie
    last in memory, all products are of matrices whose rows are positions.
    """

    shape: ConvShape

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        if self._has_rows(x):
            h = self._taps(x, weights).run(x, weights[0])
            return image_of(F.linear(h, weights[1].flatten(1)))
        down, up = weights
        h = self.shape.run(self._split(x), down)
        delta = self._up_rows(up) @ h.reshape(len(x), self.shape.groups, h.shape[1], -1)
        return delta.view(len(x), -1, *h.shape[2:])

    def add_run(self, y: Tensor, x: Tensor, weights: Weights, scale: float) -> None:
        if not (self._has_rows(x) and has_channels_last(y)):
            return super().add_run(y, x, weights, scale)
        h = self._taps(x, weights).run(x, weights[0])
        rows_of(y).addmm_(h.flatten(0, -2), weights[1].flatten(1).t(), alpha=scale)

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        if self._has_rows(x):
            spread, matrix, grads = self._row_gradients(grad, x, weights, scale)
            return image_of((spread @ matrix).view(x.movedim(1, -1).shape)) if wants_x else None, grads
        down, up = weights
        groups, split = self.shape.groups, self._split(x)
        h = self.shape.run(split, down)
        rows = grad.reshape(len(x), groups, grad.shape[1] // groups, -1)
        grad_up = (h.reshape(len(x), groups, h.shape[1], -1) @ rows.mT).sum(0).mT.reshape(up.shape) * scale
        grad_h = (self._up_rows(up).mT @ rows).view(h.shape) * scale
        grad_x, grad_down = self.shape.gradients(grad_h, split, down, wants_x)
        return grad_x, (grad_down, grad_up)

    def add_gradients(self, grad_x: Tensor, grad: Tensor, x: Tensor, weights: Weights, scale: float) -> Weights:
        if not (self._has_rows(x) and has_channels_last(grad_x)):
            return super().add_gradients(grad_x, grad, x, weights, scale)
        spread, matrix, grads = self._row_gradients(grad, x, weights, scale)
        rows_of(grad_x).addmm_(spread, matrix)
        return grads

    def _has_rows(self, x: Tensor) -> bool:
        return self.shape.groups == 1 and has_channels_last(x)

    def _taps(self, x: Tensor, weights: Weights) -> Taps:
        return Taps(self.shape, tuple(weights[0].shape[2:]), tuple(x.shape[2:]))

    def _row_gradients(self, grad: Tensor, x: Tensor, weights: Weights, scale: float) -> tuple[Tensor, Tensor, Weights]:
        """spread [N, K r] and matrix [K r, n_in], whose product is the gradient of x's rows, and the weights' own."""
        down, up = weights
        taps, grad_rows = self._taps(x, weights), rows_of(grad)
        h = taps.run(x, down).flatten(0, -2)
        grad_h, grad_up = _through_up(grad_rows, h, up.flatten(1), scale)
        spread = taps.spread(grad_h.view(len(x), *grad.shape[2:], -1))
        grad_down = taps.kernel_of(spread.t().contiguous() @ rows_of(x), down.shape)
        return spread, taps.matrix_of(down), (grad_down, grad_up.view(up.shape))

    def _split(self, x: Tensor) -> Tensor:
        """x [B, n_in, …] -> [B g, n_in / g, …]."""
        groups = self.shape.groups
        return x if groups == 1 else x.reshape(len(x) * groups, -1, *x.shape[2:])

    def _up_rows(self, up: Tensor) -> Tensor:
        """up [n_out, r, 1…] -> [g, n_out / g, r]."""
        return up.reshape(self.shape.groups, -1, up.shape[1])
