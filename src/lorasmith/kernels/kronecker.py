"""Products with a Kronecker product w1 (x) w2, by the vec trick: neither it nor its gradient is ever made.

With x cut into b parts of d numbers, (w1 (x) w2) x is w1 X w2^T for X [b, d] (Van Loan 2000, "The ubiquitous Kronecker
product", eq. 2). w1 [a, b], w2 [c, d] or [c, d, k…]; n_out = a c, n_in = b d; P positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.kernels.convolution import ConvShape
from lorasmith.kernels.update import Operation, Weights


@dataclass(frozen=True)
class KroneckerLinear(Operation):
    """x [..., b d], weights (w1 [a, b], w2 [c, d]) -> x (w1 (x) w2)^T [..., a c]."""

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        w1, w2 = weights
        parts = F.linear(_parts(x, w1, w2), w2)
        return torch.matmul(w1, parts).view(*x.shape[:-1], -1)

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        w1, w2 = weights
        parts = _parts(x, w1, w2)
        grad_y = grad.reshape(-1, w1.shape[0], w2.shape[0]) * scale
        grad_w1 = _pairs(grad_y, F.linear(parts, w2))
        grad_h = torch.matmul(w1.t(), grad_y)
        grad_w2 = grad_h.flatten(0, 1).t() @ parts.flatten(0, 1)
        return grad_h @ w2 if wants_x else None, (grad_w1, grad_w2)


@dataclass(frozen=True)
class KroneckerConv(Operation):
    """x [B, b d, …], weights (w1 [a, b], w2 [c, d, k…]) -> x with the weight w1 (x) w2 [B, a c, …]; without groups."""

    shape: ConvShape

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        w1, w2 = weights
        h = self.shape.run(self._split(x, w1), w2)
        y = torch.matmul(w1, h.reshape(len(x), w1.shape[1], -1))
        return y.view(len(x), -1, *h.shape[2:])

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        w1, w2 = weights
        split = self._split(x, w1)
        h = self.shape.run(split, w2)
        grad_y = grad.reshape(len(x), w1.shape[0], -1) * scale
        grad_w1 = _pairs(grad_y, h.reshape(len(x), w1.shape[1], -1))
        grad_h = torch.matmul(w1.t(), grad_y).view(h.shape)
        grad_x, grad_w2 = self.shape.gradients(grad_h, split, w2, wants_x)
        return grad_x, (grad_w1, grad_w2)

    def _split(self, x: Tensor, w1: Tensor) -> Tensor:
        """x [B, b d, …] -> [B b, d, …]."""
        return x.reshape(len(x) * w1.shape[1], -1, *x.shape[2:])


def _parts(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x [..., b d] -> [N, b, d]."""
    return x.reshape(-1, w1.shape[1], w2.shape[1])


def _pairs(grad: Tensor, h: Tensor) -> Tensor:
    """grad [N, a, P], h [N, b, P] -> the sum over N and P of their products [a, b]."""
    return torch.einsum("nap,nbp->ab", grad, h)
