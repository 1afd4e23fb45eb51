"""Convolutions of any number of axes, and their gradients."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvShape:
    """How a convolution of any number of axes runs over its input. k… the kernel's axes."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def num_axes(self) -> int:
        return len(self.stride)

    def run(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """x [B, n_in, …], weight [n, n_in / groups, k…] -> [B, n, …]."""
        return torch.convolution(
            x, weight, None, self.stride, self.padding, self.dilation, False, (0,) * self.num_axes, groups
        )

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, groups: int = 1
    ) -> tuple[Tensor | None, Tensor]:
        """The gradients of x (None unless wanted) and weight of run(x, weight, groups), given that of its result."""
        return self._backward(grad, x, weight, groups, (wants_x, True, False))[:2]

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """The gradient of x, of which the shape and the layout in memory count alone."""
        return self._backward(grad, x, weight, groups, (True, False, False))[0]

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: tuple[bool, bool, bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0,) * self.num_axes, groups, wanted
        )

    def is_pointwise(self, kernel: tuple[int, ...]) -> bool:
        """Whether it multiplies each position alone."""
        return {*kernel, *self.stride} == {1} and not any(self.padding)

    def mirrored(self, kernel: tuple[int, ...]) -> "ConvShape | None":
        """The convolution that gives the gradient of x, with the weight flipped: of stride 1; None where none does."""
        padding = tuple(d * (k - 1) - p for d, k, p in zip(self.dilation, kernel, self.padding, strict=True))
        if set(self.stride) != {1} or min(padding) < 0:
            return None
        return replace(self, padding=padding)


def flipped(weight: Tensor, groups: int) -> Tensor:
    """weight [n_out, n_in / g, k…] -> [n_in, n_out / g, k…], each kernel back to front."""
    split = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return split.flip(*range(2, weight.ndim)) if weight.ndim > 2 else split
