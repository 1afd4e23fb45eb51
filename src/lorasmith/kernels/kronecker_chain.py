"""Products with w1 (x) (w2_a w2_b), Kronecker's product with a second half of low rank, as three of matrices.

w1 (x) (w2_a w2_b) = (I (x) w2_a) (w1 (x) I) (I (x) w2_b), each factor of which is thin or small (Van Loan 2000, "The
ubiquitous Kronecker product", section 2). w1 [a, b], w2_a [c, r], w2_b [r, d] or [r, d, k…]; n_out = a c, n_in = b d; m
blocks of I (x) w2 are taken together. Rows are positions: the channels lie last.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lorasmith.kernels.blocks import repeated, spread, summed, together, traced
from lorasmith.kernels.convolution import ConvShape
from lorasmith.kernels.taps import has_channels_last, image_of
from lorasmith.kernels.update import Operation, Weights


class _Chain(NamedTuple):
    """down [m r, m d, k…], mix [a r, b r], up [m c, m r], times the scale; m of its own below and above."""

    down: Tensor
    mix: Tensor
    up: Tensor
    below: int
    above: int

    @classmethod
    def of(cls, weights: Weights, scale: float) -> "_Chain":
        w1, w2_a, w2_b = weights
        below, above = together(w1.shape[1], w2_b.shape[1]), together(len(w1), len(w2_a))
        return cls(repeated(w2_b, below), spread(w1, len(w2_b)), repeated(w2_a * scale, above), below, above)

    def mixed(self, h: Tensor) -> Tensor:
        """h [..., b r] -> what up multiplies [N a / m, m r]."""
        return F.linear(h, self.mix).view(-1, self.up.shape[1])


@dataclass(frozen=True)
class KroneckerChain(Operation):
    """x [..., b d] or [B, b d, …], weights (w1, w2_a, w2_b) -> x with the weight w1 (x) (w2_a w2_b); without groups."""

    conv: ConvShape | None = None

    def run(self, x: Tensor, weights: Weights) -> Tensor:
        chain = _Chain.of(weights, 1.0)
        h = self._inner(x, chain)
        y = F.linear(chain.mixed(h), chain.up).view(*h.shape[:-1], -1)
        return y if self.conv is None else image_of(y)

    def add_run(self, y: Tensor, x: Tensor, weights: Weights, scale: float) -> None:
        if not self._lies_in_rows(y):
            return super().add_run(y, x, weights, scale)
        chain = _Chain.of(weights, scale)
        self._rows(y, len(chain.up)).addmm_(chain.mixed(self._inner(x, chain)), chain.up.t())

    def gradients(
        self, grad: Tensor, x: Tensor, weights: Weights, scale: float, wants_x: bool
    ) -> tuple[Tensor | None, Weights]:
        chain = _Chain.of(weights, scale)
        grad_h, (grad_w1, grad_w2_a) = self._inner_gradient(grad, x, chain, weights, scale)
        if self._is_pointwise(chain):
            rows = grad_h.view(-1, len(chain.down))
            grad_down = rows.t() @ self._rows(x, chain.down.shape[1])
            grad_x = (rows @ chain.down.flatten(1)).view(self._with_channels_last(x).shape) if wants_x else None
            grad_x = grad_x if grad_x is None or self.conv is None else image_of(grad_x)
        else:
            assert self.conv is not None
            num_groups = weights[0].shape[1] // chain.below
            kernels = _for_groups(chain.down, num_groups)
            grad_x, grad_down = self.conv.gradients(image_of(grad_h), x, kernels, wants_x, num_groups)
            grad_down = grad_down.unflatten(0, (num_groups, -1)).sum(0)
        grad_w2_b = summed(grad_down.view(chain.down.shape), chain.below)
        return grad_x, (grad_w1, grad_w2_a, grad_w2_b)

    def add_gradients(self, grad_x: Tensor, grad: Tensor, x: Tensor, weights: Weights, scale: float) -> Weights:
        chain = _Chain.of(weights, scale)
        if not (self._is_pointwise(chain) and self._lies_in_rows(grad_x)):
            return super().add_gradients(grad_x, grad, x, weights, scale)
        grad_h, (grad_w1, grad_w2_a) = self._inner_gradient(grad, x, chain, weights, scale)
        rows, width = grad_h.view(-1, len(chain.down)), chain.down.shape[1]
        self._rows(grad_x, width).addmm_(rows, chain.down.flatten(1))
        grad_down = (rows.t() @ self._rows(x, width)).view(chain.down.shape)
        return grad_w1, grad_w2_a, summed(grad_down, chain.below)

    def _inner(self, x: Tensor, chain: _Chain) -> Tensor:
        """x -> h [..., b r]."""
        if self._is_pointwise(chain):
            h = F.linear(self._rows(x, chain.down.shape[1]), chain.down.flatten(1))
            return h.view(*self._with_channels_last(x).shape[:-1], -1)
        assert self.conv is not None
        num_groups = x.shape[1] // chain.down.shape[1]
        h = self.conv.run(x, _for_groups(chain.down, num_groups), num_groups)
        return h.movedim(1, -1).contiguous()

    def _inner_gradient(
        self, grad: Tensor, x: Tensor, chain: _Chain, weights: Weights, scale: float
    ) -> tuple[Tensor, Weights]:
        """The gradients of h [..., b r], and of w1 and w2_a."""
        h = self._inner(x, chain)
        rows = self._rows(grad, len(chain.up))
        grad_up = rows.t() @ chain.mixed(h)
        grad_mixed = (rows @ chain.up).view(-1, len(chain.mix))
        grad_mix = grad_mixed.t() @ h.view(-1, h.shape[-1])
        grad_w1 = traced(grad_mix, weights[1].shape[1])
        return (grad_mixed @ chain.mix).view(h.shape), (grad_w1, summed(grad_up, chain.above) * scale)

    def _is_pointwise(self, chain: _Chain) -> bool:
        return self.conv is None or self.conv.is_pointwise(tuple(chain.down.shape[2:]))

    def _lies_in_rows(self, x: Tensor) -> bool:
        return x.is_contiguous() if self.conv is None else has_channels_last(x)

    def _with_channels_last(self, x: Tensor) -> Tensor:
        return x if self.conv is None else x.movedim(1, -1)

    def _rows(self, x: Tensor, width: int) -> Tensor:
        """x -> [numbers / width, width]; a view where the channels lie last."""
        return self._with_channels_last(x).reshape(-1, width)


def _for_groups(down: Tensor, num_groups: int) -> Tensor:
    """down [m r, m d, k…] -> the weight of a convolution with these groups [b r, m d, k…]."""
    return down.repeat(num_groups, *[1] * (down.ndim - 1))
