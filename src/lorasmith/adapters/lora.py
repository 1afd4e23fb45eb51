"""LoRA (Hu et al. 2022, eq. 3): W x + (alpha / rank) B A x, with A and B of the given rank and B = 0 at the start."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Layer, Member
from lorasmith.adapters.low_rank import LORA_PAIR, LowRankAdapter, fuse_pairs, lora_to_peft, split_pairs
from lorasmith.adapters.parts import DOWN, UP, Parts, alpha_of, fitting, for_file, size_of
from lorasmith.ops.additive import Base, Build, Operation, Weights, as_they_are, updated
from lorasmith.ops.dense import DenseConv, DenseLinear
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear
from lorasmith.rng import kaiming


class LoRAAdapter(LowRankAdapter):
    """The adapter of one layer. r rank, g the layer's groups, k… its kernel."""

    algorithm = "LoRA"
    MARKS = frozenset({DOWN, UP})
    SUFFIXES = MARKS | {"alpha"}
    BY_OUTPUT = frozenset({UP})
    KOHYA_MODULE = "networks.lora"
    LYCORIS_ARGS = {"algo": "locon"}
    takes_base = True

    def __init__(self, layer: Layer, down: Tensor, up: Tensor, alpha: float) -> None:
        """down [r, n_in] or [r, n_in / g, k…], up [n_out, r] or [n_out, r, 1…]."""
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self._alpha = alpha
        self.operation, self.build = way(layer, len(down))

    @classmethod
    def new(cls, layer: Layer, rank: int, alpha: float | None, path: str, seed: int) -> "LoRAAdapter":
        """The identity."""
        down, up = new_factors(layer, rank, path, seed)
        return cls(layer, down, up, float(rank) if alpha is None else alpha)

    @classmethod
    def from_file(cls, layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> "LoRAAdapter":
        """The adapter that a file holds for this layer; ValueError where its shapes do not fit the layer.

        Without alpha the scale is 1, as in every reader of such files.
        """
        down, up = read_factors(layer, tensors)
        return cls(layer, down, up, alpha_of(tensors, len(down)))

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def alpha(self) -> float:
        return self._alpha

    def forward(self, x: Tensor, y: Tensor | Base, bias: Tensor | None = None, base: nn.Module | None = None) -> Tensor:
        """x [..., n_in] or [B, n_in, …], y [..., n_out] or [B, n_out, …] -> adapted y, in y's dtype."""
        return updated(x, y, self.operation, (self.down, self.up), self.alpha / self.rank, self.build)

    def merged(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank) up down, float32."""
        return weight.float() + self.alpha / self.rank * product(self.down.float(), self.up.float(), weight.shape)

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """down, up and alpha under kohya's names."""
        return for_file({DOWN: self.down, UP: self.up}, self.alpha, dtype)

    @classmethod
    def fuse(cls, members: Sequence[Member]) -> dict[str, Tensor]:
        """A diagonal of blocks."""
        return fuse_pairs(members, LORA_PAIR)

    @classmethod
    def split(cls, parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
        """A member's rows of B, and its block where there is a diagonal of them."""
        return split_pairs(parts, members, LORA_PAIR)

    @classmethod
    def to_peft(cls, parts: Parts) -> dict[str, Tensor]:
        """A, and B times alpha / rank."""
        return lora_to_peft(parts)


def new_factors(layer: Layer, rank: int, path: str, seed: int) -> tuple[Tensor, Tensor]:
    """A, uniform in ±1 / sqrt(fan-in), drawn from (seed, path), and B, which is 0."""
    down = kaiming(seed, path, (rank, layer.fan_in)).view(_down_shape(layer, rank))
    return down, torch.zeros(_up_shape(layer, rank), dtype=torch.float32)


def read_factors(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A file's A and B; ValueError where their shapes do not fit the layer.

    Convolutions with a kernel of 1 may be stored as matrices.
    """
    down, up = (tensors.get(suffix, torch.empty(1)) for suffix in (DOWN, UP))
    rank = size_of(tensors, DOWN, 0)
    stored = dict(tensors)
    if layer.conv is not None and math.prod(layer.kernel) == 1 and down.ndim == up.ndim == 2:
        ones = [1] * len(layer.kernel)
        stored |= {DOWN: down.view(*down.shape, *ones), UP: up.view(*up.shape, *ones)}
    down = fitting(stored, DOWN, _down_shape(layer, rank))
    return down, fitting(stored, UP, _up_shape(layer, rank))


def way(layer: Layer, rank: int) -> tuple[Operation, Build]:
    """How the layer's delta is multiplied by: in the fewest multiplications for its shape."""
    if layer.is_cheaper_in_two(rank):
        return LowRankLinear() if layer.conv is None else LowRankConv(layer.conv), as_they_are
    return DenseLinear() if layer.conv is None else DenseConv(layer.conv), partial(_product, layer)


def _product(layer: Layer, down: Tensor, up: Tensor) -> Weights:
    """The factors -> the delta, in the weight's shape, unscaled."""
    return (product(down, up, layer.weight_shape),)


def product(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> Tensor:
    """down [r, n_in] or [r, n_in / g, k…], up [n_out, r] or [n_out, r, 1…] -> up down in a weight's shape."""
    return (up.flatten(1) @ down.flatten(1)).view(shape)


def _down_shape(layer: Layer, rank: int) -> tuple[int, ...]:
    return (rank, *layer.weight_shape[1:])


def _up_shape(layer: Layer, rank: int) -> tuple[int, ...]:
    return (layer.n_out, rank, *[1] * len(layer.kernel))
