"""What adapters know of the layers they hang on: sizes, never weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lorasmith.kernels.low_rank import ConvShape

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A linear layer (conv None) or a convolution of any number of axes."""

    n_in: int
    n_out: int
    kernel: tuple[int, ...] = ()
    conv: ConvShape | None = None

    @classmethod
    def of(cls, path: str, module: nn.Module) -> "Layer":
        """The sizes of a module of one of the ADAPTABLE kinds; ValueError where its padding is not plain zeros."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features)
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d), type(module)
        if module.padding_mode != "zeros":
            raise ValueError(f"{path}: convolutions must pad with zeros to be adapted, got {module.padding_mode!r}")
        conv = ConvShape(module.stride, _padding(path, module), module.dilation, module.groups)
        return cls(module.in_channels, module.out_channels, module.kernel_size, conv)


def _padding(path: str, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """The zeros added on either side of each axis."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(r % 2 for r in reach):
        raise ValueError(f"{path}: padding 'same' must be even to be adapted, got a kernel of {module.kernel_size}")
    return tuple(r // 2 for r in reach)


class Adapter(Protocol):
    """What hangs on one layer; a torch module, its parameters being what is trained."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x, the layer's input, y, its output -> adapted y, in y's shape and dtype."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def file_tensors(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """{suffix in the file: tensor}, weights in this dtype."""
        ...
