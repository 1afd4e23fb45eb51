"""The parts of an adapter in a file: their names, and how they are read and written."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
"""{part: tensor} of one layer in a file."""
DOWN, UP = "lora_down.weight", "lora_up.weight"
SCALE, VECTOR = "dora_scale", "lora_magnitude_vector"
"""The lengths of DoRA: LyCORIS's name, [n_out, 1…]; PEFT's, [n_out], or [1, n_out, 1…] of a convolution."""
OFFSETS = {"diff": "weight", "diff_b": "bias"}
"""The parts that are added to a parameter of the layer, and its name."""


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
