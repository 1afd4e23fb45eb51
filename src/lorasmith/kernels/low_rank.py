"""Products with a weight up down of low rank, in two steps. r rank, g groups, k… the kernel's axes.

The inner product h = down(x) is computed again in the backward pass: at rank r it costs r / n_out of the layer's own
product. Products are arranged so that the rank is never the last axis of a result, which matrix libraries are slow at.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lorasmith.kernels.convolution import ConvShape
from lorasmith.kernels.update import Weights


@dataclass(frozen=True)
class LowRankLinear:
    """x [..., n_in], weights (down [r, n_in], up [n_out, r]) -> x down^T up^T [..., n_out]."""

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        down, up = weights
        return F.linear(F.linear(x, down), up)

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        down, up = weights
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_h = F.linear(grad_rows, up.t().contiguous()) * scale
        grad_up = (F.linear(rows, down).t() @ grad_rows).t().contiguous() * scale
        return grad_h @ down if wants_x else None, (grad_h.t() @ rows, grad_up)


@dataclass(frozen=True)
class LowRankConv:
    """x [B, n_in, …], weights (down [r, n_in / g, k…], up [n_out, r, 1…]) -> x with the weight up down [B, n_out, …].

    With g groups, the weight of group j is up_j down: the groups share `down` and each has its rows of `up`. So down
    runs over x [B g, n_in / g, …], and up multiplies h [B, g, r, positions].
    """

    shape: ConvShape

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        down, up = weights
        h = self.shape.run(self._split(x), down)
        delta = self._up_rows(up) @ h.reshape(len(x), self.shape.groups, h.shape[1], -1)
        return delta.view(len(x), -1, *h.shape[2:])

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        down, up = weights
        groups, split = self.shape.groups, self._split(x)
        h = self.shape.run(split, down)
        rows = grad.reshape(len(x), groups, grad.shape[1] // groups, -1)
        grad_up = (h.reshape(len(x), groups, h.shape[1], -1) @ rows.mT).sum(0).mT.reshape(up.shape) * scale
        grad_h = (self._up_rows(up).mT @ rows).view(h.shape) * scale
        grad_x, grad_down = self.shape.gradients(grad_h, split, down, wants_x)
        return grad_x, (grad_down, grad_up)

    def _split(self, x: Tensor) -> Tensor:
        """x [B, n_in, …] -> [B g, n_in / g, …]."""
        groups = self.shape.groups
        return x if groups == 1 else x.reshape(len(x) * groups, -1, *x.shape[2:])

    def _up_rows(self, up: Tensor) -> Tensor:
        """up [n_out, r, 1…] -> [g, n_out / g, r]."""
        return up.reshape(self.shape.groups, -1, up.shape[1])
