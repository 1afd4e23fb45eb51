"""Products with a weight of the layer's own shape, for updates that have no cheaper form. g groups."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.additive import Operation, Weights
from lorasmith.ops.conv import ConvShape


@dataclass(frozen=True)
class DenseLinear(Operation):
    """x [..., n_in], weights ([n_out, n_in],) -> [..., n_out]."""

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        return F.linear(x, weights[0])

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        (weight,) = weights
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_rows @ (weight * scale) if wants_x else None
        return grad_x, (grad_rows.t() @ x.reshape(-1, x.shape[-1]) * scale,)


@dataclass(frozen=True)
class DenseConv(Operation):
    """x [B, n_in, …], weights ([n_out, n_in / g, k…],) -> [B, n_out, …]."""

    shape: ConvShape

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        return self.shape.run(x, weights[0], self.shape.groups)

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        grad_x, grad_weight = self.shape.gradients(grad, x, weights[0] * scale, wants_x, self.shape.groups)
        return grad_x, (grad_weight * scale,)
