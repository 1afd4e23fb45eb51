"""What adapters know of the layers they hang on: sizes; of a weight, what `frozen_weight.py` says."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorasmith.ops.conv import ConvShape

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A linear layer (conv None) or a convolution of any number of axes."""

    n_in: int
    n_out: int
    kernel: tuple[int, ...] = ()
    conv: ConvShape | None = None

    @property
    def groups(self) -> int:
        return 1 if self.conv is None else self.conv.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(n_out, n_in / groups, *kernel)."""
        return (self.n_out, self.n_in // self.groups, *self.kernel)

    @property
    def fan_in(self) -> int:
        """How many numbers each output is a sum over."""
        return math.prod(self.weight_shape[1:])

    def is_cheaper_in_two(self, rank: int) -> bool:
        """Whether two products, with factors of this rank, take fewer multiplications than one with their product."""
        return rank * (self.groups * self.fan_in + self.n_out) < self.fan_in * self.n_out

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

    @property
    def algorithm(self) -> str: ...

    @property
    def rank(self) -> int | None:
        """The rank that its tensors show; None where nothing is decomposed."""
        ...

    @property
    def alpha(self) -> float | None:
        """None where the algorithm has none that counts."""
        ...

    @property
    def takes_base(self) -> bool:
        """Whether it may be given a layer that is yet to run instead of its output: it only adds to that."""
        ...

    def __call__(self, x: Tensor, y: Any, bias: Tensor | None, base: nn.Module | None = None) -> Tensor:
        """x, the layer's input, y, its output, its bias, and itself -> adapted y, in y's shape and dtype.

        base is for those that ask the layer's weight (`adapters/base.py`); the others may be run without.
        """
        ...

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight [n_out, n_in / g, k…], which DoRA was made with -> with the adapter in it, float32."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def to(self, device: torch.device) -> Any:
        """Moves the parameters, as a module does."""
        ...

    def file_tensors(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """{suffix in the file: tensor}, weights in this dtype."""
        ...


def size_of(tensors: Mapping[str, Tensor], suffix: str, axis: int) -> int:
    """How long a file's tensor is along an axis; 1 where it is not there or has no such axis."""
    shape = tensors[suffix].shape if suffix in tensors else ()
    return shape[axis] if -len(shape) <= axis < len(shape) else 1


def fitting(tensors: Mapping[str, Tensor], suffix: str, shape: tuple[int, ...]) -> Tensor:
    """A copy of a file's tensor; ValueError unless it is there, has this shape and holds numbers, all finite."""
    if suffix not in tensors:
        raise ValueError(f"{suffix} is missing beside {', '.join(sorted(tensors))}")
    if tuple(tensors[suffix].shape) != shape:
        raise ValueError(f"{suffix} must have the shape {list(shape)}, got {list(tensors[suffix].shape)}")
    if not tensors[suffix].numel():
        raise ValueError(f"{suffix} must not be empty, got {list(shape)}")
    if not tensors[suffix].is_floating_point():
        raise ValueError(f"{suffix} must hold floating-point numbers, got {tensors[suffix].dtype}")
    if not tensors[suffix].float().isfinite().all():
        raise ValueError(f"{suffix} must be finite, got NaN or infinity")
    return tensors[suffix].clone()


def for_file(tensors: Mapping[str, Tensor], alpha: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights on the CPU in this dtype, and alpha in float32."""
    plain = {suffix: tensor.detach().to("cpu", dtype) for suffix, tensor in tensors.items()}
    return {**plain, "alpha": torch.tensor(alpha, dtype=torch.float32)}


def alpha_of(tensors: Mapping[str, Tensor], default: float, *, also: float | None = None) -> float:
    """A file's alpha; without one, the default; ValueError where it is not one finite number (or `also`)."""
    alpha = tensors.get("alpha", torch.tensor(default, dtype=torch.float32))
    if alpha.numel() != 1 or alpha.is_complex() or not (math.isfinite(float(alpha)) or float(alpha) == also):
        raise ValueError(f"alpha must be one finite number, got {alpha.tolist()}")
    return float(alpha)


def idle_alpha(tensors: Mapping[str, Tensor]) -> float:
    """A file's alpha where it scales nothing, so that its value does not matter; 1 where it is no finite number."""
    try:
        return alpha_of(tensors, 1.0)
    except ValueError:
        return 1.0


OFFSETS = {"diff": "weight", "diff_b": "bias"}
"""The parts that are added to a parameter of the layer, and its name."""


def normal(name: str) -> str:
    """A layer's name as readers of files compare it."""
    return name.replace(".", "_")
