"""What an adapter may ask of the weight of the layer it hangs on: lengths of its rows, and their products with others.

The one place that reads a frozen weight. A layer that keeps its own packed or quantised answers here in its own way.
r rows, g the layer's groups, k… its kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorasmith.ops.dora import SMALLEST
from lorasmith.ops.prepacked import Packed

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that products take as they are."""


class Absent(nn.Parameter):
    """A weight of which the shape alone is here, on the meta device; `loaded` reads the numbers where they are."""

    read: Callable[[], Tensor]


class NoWeights(Exception):
    """The numbers of a weight are needed, and they are nowhere."""


class Weighted(nn.Module):
    """A weight in the place of its layer, for what asks a layer for its weight alone."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def loaded(base: nn.Module) -> nn.Module:
    """A layer that has its weight: itself, or what is read for it; NoWeights where there is none."""
    return Weighted(base.weight.read()) if isinstance(base.weight, Absent) else base


def row_squares(base: nn.Module) -> Tensor:
    """The squared lengths [n_out] of a layer's rows, 1e-30 at least, in float32 or wider, on the CPU.

    Of a weight that is absent the least: lengths that are told as a change of them are then kept as they are.
    """
    if isinstance(base.weight, Absent):
        return torch.full(base.weight.shape[:1], SMALLEST, dtype=torch.float32)
    weight = _weight(base, torch.float32)
    lengths = torch.linalg.vector_norm(
        weight, dim=tuple(range(1, weight.ndim)), dtype=torch.promote_types(weight.dtype, torch.float32)
    )
    return lengths.square().clamp(min=SMALLEST).cpu()


def column_lengths(base: nn.Module, delta: Tensor | None = None) -> Tensor:
    """The lengths [n_in / g] of the columns of a layer's weight plus delta, 1e-15 at least, in float32 or wider.

    Of a weight that is absent the least, as in `row_squares`.
    """
    if isinstance(base.weight, Absent):
        return torch.full(base.weight.shape[1:2], SMALLEST, dtype=torch.float32).sqrt()
    weight = _weight(base, torch.float32)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    changed = weight if delta is None else weight + delta.to(weight.device)
    return torch.linalg.vector_norm(changed, dim=(0, *range(2, weight.ndim))).clamp(min=SMALLEST**0.5)


def row_products(base: nn.Module, rows: Tensor) -> Tensor:
    """rows [r, n_in] or [r, n_in / g, k…] -> their products with each of a layer's rows [r, n_out], in its dtype."""
    rows = rows.detach()
    if isinstance(base, Packed):
        return base.row_products(rows)
    weight = _weight(base, rows.dtype)
    if not weight.is_contiguous():  # channels_last, which flattens without a copy in the order of its memory
        weight, rows = weight.movedim(1, -1), rows.movedim(1, -1)
    return rows.to(weight.dtype).flatten(1) @ weight.flatten(1).t()


def _weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """A layer's weight, in its own dtype where products take that."""
    assert isinstance(base.weight, Tensor)
    weight = base.weight.detach()
    return weight if weight.dtype in PLAIN else weight.to(dtype)
