"""Products with w1 (x) w2, Kronecker's product, of which w2 may be w2_a w2_b: none of these is ever made.

w1 (x) w2 = (w1 (x) I) (I (x) w2), and with w2 = w2_a w2_b a product of three, (I (x) w2_a) (w1 (x) I) (I (x) w2_b),
each factor of which is thin or small (Van Loan 2000, "The ubiquitous Kronecker product", section 2). w1 [a, b], w2
[c, d] or [c, d, k…], w2_a [c, r], w2_b [r, d] or [r, d, k…], r = c without them; n_out = a c, n_in = b d; m blocks of
I (x) w2 are taken together. Rows are positions: the channels lie last. N positions.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.additive import Operation, Weights
from lorasmith.ops.block_diagonal import repeated, spread, summed, together, traced
from lorasmith.ops.conv import ConvShape
from lorasmith.ops.im2col import has_channels_last, image_of


class _Factors:
    """The weights, w1 times the scale, as they are multiplied by."""

    def __init__(self, weights: Weights, scale: float) -> None:
        """(w1, w2) or (w1, w2_a, w2_b)."""
        w1, *w2_a, below = weights
        self.scale, self.w1, self.inner = scale, w1 * scale, len(below)
        self.m_below = together(w1.shape[1], below.shape[1])
        self.down = repeated(below, self.m_below)
        """[m r, m d, k…]"""
        self.m_above = together(len(w1), len(w2_a[0])) if w2_a else 0
        self.up = repeated(w2_a[0], self.m_above) if w2_a else None
        """[m c, m r]"""

    @cached_property
    def _mix(self) -> Tensor:
        """w1 (x) I [a r, b r]."""
        return spread(self.w1, self.inner)

    @property
    def num_groups(self) -> int:
        """How many times down is run."""
        return self.w1.shape[1] // self.m_below

    def kernels(self) -> Tensor:
        """down, as the weight of a convolution with groups [b r, m d, k…]."""
        return self.down.repeat(self.num_groups, *[1] * (self.down.ndim - 1))

    def mixed(self, h: Tensor) -> Tensor:
        """h [N, b r] -> [N, a r]."""
        if self.up is None:
            return torch.matmul(self.w1, h.view(-1, self.w1.shape[1], self.inner)).flatten(1)
        return F.linear(h, self._mix)

    def mix_gradients(self, grad: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """grad [N, a r], h [N, b r] -> the gradients of h and w1."""
        if self.up is not None:
            return grad @ self._mix, traced(grad.t() @ h, self.inner) * self.scale
        one, other = (t.view(len(t), -1, self.inner) for t in (grad, h))
        pairs = one.transpose(0, 1).flatten(1) @ other.transpose(0, 1).flatten(1).t()
        return torch.matmul(self.w1.t(), one).flatten(1), pairs * self.scale


@dataclass(frozen=True)
class Kronecker(Operation):
    """x [..., b d] or [B, b d, …], weights (w1, w2) or (w1, w2_a, w2_b) -> x with w1 (x) w2; without groups."""

    conv: ConvShape | None = None

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        factors = _Factors(weights, 1.0)
        h = self._inner(x, factors)
        rows = factors.mixed(h.flatten(0, -2))
        if factors.up is not None:
            rows = F.linear(rows.view(-1, factors.up.shape[1]), factors.up)
        return self._image(rows.view(*h.shape[:-1], -1))

    def add_run(self, y: Tensor, x: Tensor, weights: Weights, scale: float) -> Tensor | None:
        if not self._lies_in_rows(y):
            return super().add_run(y, x, weights, scale)
        factors = _Factors(weights, scale)
        rows = factors.mixed(self._inner(x, factors).flatten(0, -2))
        if factors.up is None:
            self._rows(y, rows.shape[1]).add_(rows)
        else:
            self._rows(y, len(factors.up)).addmm_(rows.view(-1, factors.up.shape[1]), factors.up.t())

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        factors = _Factors(weights, scale)
        grad_h, grads = self._outer_gradients(grad, x, factors)
        if self._is_pointwise(factors):
            grad_below, rows = self._below_gradient(grad_h, x, factors)
            grad_x = (rows @ factors.down.flatten(1)).view(self._with_channels_last(x).shape) if wants_x else None
            return None if grad_x is None else self._image(grad_x), (*grads, grad_below)
        assert self.conv is not None
        grad_x, grad_kernels = self.conv.gradients(image_of(grad_h), x, factors.kernels(), wants_x, factors.num_groups)
        grad_down = grad_kernels.unflatten(0, (factors.num_groups, -1)).sum(0)
        return grad_x, (*grads, summed(grad_down, factors.m_below))

    def add_gradients(
        self, grad_x: Tensor, grad: Tensor, x: Tensor, weights: Weights, scale: float, kept: Tensor | None = None
    ) -> Weights:
        factors = _Factors(weights, scale)
        if not (self._is_pointwise(factors) and self._lies_in_rows(grad_x)):
            return super().add_gradients(grad_x, grad, x, weights, scale, kept)
        grad_h, grads = self._outer_gradients(grad, x, factors)
        grad_below, rows = self._below_gradient(grad_h, x, factors)
        self._rows(grad_x, factors.down.shape[1]).addmm_(rows, factors.down.flatten(1))
        return *grads, grad_below

    def _inner(self, x: Tensor, factors: _Factors) -> Tensor:
        """x -> h [..., b r]."""
        if self._is_pointwise(factors):
            h = F.linear(self._rows(x, factors.down.shape[1]), factors.down.flatten(1))
            return h.view(*self._with_channels_last(x).shape[:-1], -1)
        assert self.conv is not None
        return self.conv.run(x, factors.kernels(), factors.num_groups).movedim(1, -1).contiguous()

    def _outer_gradients(self, grad: Tensor, x: Tensor, factors: _Factors) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradients of h [..., b r], and of w1 and, where there is one, w2_a."""
        h = self._inner(x, factors)
        flat = h.flatten(0, -2)
        if factors.up is None:
            grad_h, grad_w1 = factors.mix_gradients(self._rows(grad, len(factors.w1) * factors.inner), flat)
            return grad_h.view(h.shape), (grad_w1,)
        rows = self._rows(grad, len(factors.up))
        grad_up = rows.t() @ factors.mixed(flat).view(-1, factors.up.shape[1])
        grad_h, grad_w1 = factors.mix_gradients((rows @ factors.up).view(len(flat), -1), flat)
        return grad_h.view(h.shape), (grad_w1, summed(grad_up, factors.m_above))

    def _below_gradient(self, grad_h: Tensor, x: Tensor, factors: _Factors) -> tuple[Tensor, Tensor]:
        """The gradient of w2 or w2_b, and grad_h as rows [N b / m, m r], of what multiplies each position alone."""
        rows = grad_h.view(-1, len(factors.down))
        grad_down = rows.t() @ self._rows(x, factors.down.shape[1])
        return summed(grad_down.view(factors.down.shape), factors.m_below), rows

    def _is_pointwise(self, factors: _Factors) -> bool:
        return self.conv is None or self.conv.is_pointwise(tuple(factors.down.shape[2:]))

    def _lies_in_rows(self, x: Tensor) -> bool:
        return x.is_contiguous() if self.conv is None else has_channels_last(x)

    def _with_channels_last(self, x: Tensor) -> Tensor:
        return x if self.conv is None else x.movedim(1, -1)

    def _image(self, rows: Tensor) -> Tensor:
        return rows if self.conv is None else image_of(rows)

    def _rows(self, x: Tensor, width: int) -> Tensor:
        """x -> [numbers / width, width]; a view where the channels lie last."""
        return self._with_channels_last(x).reshape(-1, width)
