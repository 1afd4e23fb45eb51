"""A convolution to few channels as one matrix product over the positions of its input.

Every position is multiplied by the weights of all K taps of the kernel at once; the few numbers that this gives a
position are then moved to where each tap belongs and added up. So x, which is large, is read once and never unfolded.
r output channels; channels last: [B, …, channels].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.kernels.convolution import ConvShape


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

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, n_in, …], weight [r, n_in, k…] -> [B, …, r]."""
        found = F.linear(rows_of(x), self.matrix_of(weight)).view(len(x), *self.size, -1)
        return found if self._is_one_tap else self._gathered(found, len(weight))

    def matrix_of(self, weight: Tensor) -> Tensor:
        """weight [r, n_in, k…] -> [K r, n_in]."""
        return weight.flatten(2).permute(2, 0, 1).reshape(-1, weight.shape[1])

    def kernel_of(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """matrix [K r, n_in] -> the weight [r, n_in, k…] that makes it."""
        return matrix.view(-1, shape[0], shape[1]).permute(1, 2, 0).reshape(shape)

    def spread(self, grad: Tensor) -> Tensor:
        """grad [B, …, r] of the output -> that of what each tap found at the input [positions, K r]."""
        num_channels = grad.shape[-1]
        if self._is_one_tap:
            return grad.reshape(-1, num_channels)
        places = list(self._places(grad.shape[1:-1]))
        padded = [n + 2 * p for n, p in zip(self.size, self.shape.padding, strict=True)]
        spread = grad.new_zeros(len(grad), *padded, len(places), num_channels)
        for tap, place in enumerate(places):
            spread[(slice(None), *place, tap)] = grad
        inner = tuple(slice(p, p + n) for n, p in zip(self.size, self.shape.padding, strict=True))
        return spread[(slice(None), *inner)].reshape(-1, len(places) * num_channels)

    def _gathered(self, found: Tensor, num_channels: int) -> Tensor:
        """What each tap found at the input [B, …, K r] -> their sums at the output [B, …, r], made in float32."""
        around = [p for padding in reversed(self.shape.padding) for p in (padding, padding)]
        padded = F.pad(found, (0, 0, *around)).unflatten(-1, (-1, num_channels))
        size = self._output_size
        total = found.new_zeros(len(found), *size, num_channels, dtype=torch.promote_types(found.dtype, torch.float32))
        for tap, place in enumerate(self._places(size)):
            total += padded[(slice(None), *place, tap)]
        return total.to(found.dtype)

    @property
    def _output_size(self) -> tuple[int, ...]:
        shape = self.shape
        ranges = zip(self.size, self.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in ranges)

    @property
    def _is_one_tap(self) -> bool:
        return {*self.kernel, *self.shape.stride} == {1} and not any(self.shape.padding)

    def _places(self, output: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """Where in the padded input each tap lies, for all positions of the output at once."""
        for tap in product(*map(range, self.kernel)):
            axes = zip(tap, output, self.shape.stride, self.shape.dilation, strict=True)
            yield tuple(slice(d * i, d * i + s * (n - 1) + 1, s) for i, n, s, d in axes)
