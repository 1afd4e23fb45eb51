"""Convolutions of any number of axes, and their gradients."""

from dataclasses import dataclass

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
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, (0,) * self.num_axes, groups,
            (wants_x, True, False),
        )[:2]  # fmt: skip

    def is_pointwise(self, kernel: tuple[int, ...]) -> bool:
        """Whether it multiplies each position alone."""
        return {*kernel, *self.stride} == {1} and not any(self.padding)
