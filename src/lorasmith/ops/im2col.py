"""The gradients of a convolution to few channels as matrix products over the positions of its input.

The few numbers that the output's gradient has for a position are copied to where each of the K taps of the kernel met
the input: the rest is one product with all taps' weights, and one with the input, which is large and never unfolded.
r output channels; channels last: [B, …, channels].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lorasmith.ops.conv import ConvShape


def has_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, …] lies in memory as [B, …, C]."""
    return x.movedim(1, -1).is_contiguous()


def rows_of(x: Tensor) -> Tensor:
    """x [B, C, …] -> [positions, C]; a view where the channels lie last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def image_of(x: Tensor) -> Tensor:
    """x [B, …, C] -> [B, C, …], a view."""
    return x.movedim(-1, 1)


@dataclass(frozen=True)
class Taps:
    """The taps of a convolution's kernel over an input of this size."""

    shape: ConvShape
    kernel: tuple[int, ...]
    size: tuple[int, ...]

    def reach(self, x: Tensor) -> int:
        """How many numbers of a channel of the output meet x's positions [B, n_in, …]: K each."""
        return math.prod(self.kernel) * len(x) * math.prod(self.size)

    def matrix_of(self, weight: Tensor) -> Tensor:
        """weight [r, n_in, k…] -> [K r, n_in]."""
        return weight.flatten(2).permute(2, 0, 1).reshape(-1, weight.shape[1])

    def kernel_of(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """matrix [K r, n_in] -> the weight [r, n_in, k…] that makes it."""
        return matrix.view(-1, shape[0], shape[1]).permute(1, 2, 0).reshape(shape)

    def spread(self, grad: Tensor) -> Tensor:
        """grad [B, …, r] of the output -> that of what each tap found at the input [positions, K r]."""
        num_channels = grad.shape[-1]
        if self.shape.is_pointwise(self.kernel):
            return grad.reshape(-1, num_channels)
        places = list(self._places(grad.shape[1:-1]))
        padded = [n + 2 * p for n, p in zip(self.size, self.shape.padding, strict=True)]
        spread = grad.new_zeros(len(grad), *padded, len(places), num_channels)
        for tap, place in enumerate(places):
            spread[(slice(None), *place, tap)] = grad
        inner = tuple(slice(p, p + n) for n, p in zip(self.size, self.shape.padding, strict=True))
        return spread[(slice(None), *inner)].reshape(-1, len(places) * num_channels)

    def _places(self, output: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """Where in the padded input each tap lies, for all positions of the output at once."""
        for tap in product(*map(range, self.kernel)):
            axes = zip(tap, output, self.shape.stride, self.shape.dilation, strict=True)
            yield tuple(slice(d * i, d * i + s * (n - 1) + 1, s) for i, n, s, d in axes)
