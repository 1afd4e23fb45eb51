"""LoRA (Hu et al. 2022, eq. 3): W x + (alpha / rank) B A x, with A and B of the given rank and B = 0 at the start."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lorasmith.adapters.layer import Layer
from lorasmith.component import Component
from lorasmith.draws import Purpose, path_number, uniform
from lorasmith.kernels.low_rank import low_rank_conv, low_rank_linear

Rank = Annotated[int, Field(ge=1, le=128, description="inner dimension of the adapters")]
Alpha = Annotated[
    float | None,
    Field(gt=0, le=1e6, allow_inf_nan=False, description="the update is scaled by alpha / rank; none: the rank"),
]


class LoRA(Component):
    """Low-rank adapters: y + (alpha / rank) up(down(x))."""

    name: Literal["LoRA"] = "LoRA"
    rank: Rank = 8
    alpha: Alpha = None

    def build(self, layer: Layer, path: str, seed: int) -> "LoRAAdapter":
        """A new adapter, the identity; A is uniform in ±1 / sqrt(fan-in), drawn from (seed, path)."""
        fan_in = _fan_in(layer)
        u = uniform(seed, Purpose.INIT, path_number(path), (self.rank, fan_in))
        down = ((2 * u - 1) / math.sqrt(fan_in)).view(_down_shape(layer, self.rank))
        up = torch.zeros(_up_shape(layer, self.rank))
        return LoRAAdapter(layer, down, up, float(self.rank) if self.alpha is None else self.alpha)


class LoRAAdapter(nn.Module):
    """The adapter of one layer. r rank, g the layer's groups, k… its kernel."""

    SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")

    def __init__(self, layer: Layer, down: Tensor, up: Tensor, alpha: float) -> None:
        """down [r, n_in] or [r, n_in / g, k…], up [n_out, r] or [n_out, r, 1…]."""
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.alpha = alpha

    @classmethod
    def from_file(cls, layer: Layer, tensors: Mapping[str, Tensor]) -> "LoRAAdapter":
        """The adapter that a file holds for this layer; ValueError where its shapes do not fit the layer.

        Without alpha the scale is 1, as in every reader of such files.
        """
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = down.shape[0]
        for tensor, shape in ((down, _down_shape(layer, rank)), (up, _up_shape(layer, rank))):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"shape must be {list(shape)}, got {list(tensor.shape)}")
        alpha = float(tensors["alpha"]) if "alpha" in tensors else float(rank)
        return cls(layer, down.clone(), up.clone(), alpha)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., n_in] or [B, n_in, …], y [..., n_out] or [B, n_out, …] -> adapted y, in y's dtype."""
        scale = self.alpha / self.rank
        if self.layer.conv is None:
            return low_rank_linear(x, y, self.down, self.up, scale)
        return low_rank_conv(x, y, self.down, self.up, scale, self.layer.conv)

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """down, up and alpha under kohya's names, on the CPU; alpha in float32."""
        tensors = (self.down.detach().to("cpu", dtype), self.up.detach().to("cpu", dtype), torch.tensor(self.alpha))
        return dict(zip(self.SUFFIXES, tensors, strict=True))


def _fan_in(layer: Layer) -> int:
    groups = 1 if layer.conv is None else layer.conv.groups
    return layer.n_in // groups * math.prod(layer.kernel)


def _down_shape(layer: Layer, rank: int) -> tuple[int, ...]:
    if layer.conv is None:
        return (rank, layer.n_in)
    return (rank, layer.n_in // layer.conv.groups, *layer.kernel)


def _up_shape(layer: Layer, rank: int) -> tuple[int, ...]:
    return (layer.n_out, rank, *[1] * len(layer.kernel))
