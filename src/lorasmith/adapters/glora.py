"""GLoRA (Chavan et al. 2023, "One-for-All", as LyCORIS has it): W + s (W A1 A2 + B1 B2), s = alpha / rank.

A1 A2 changes the layer's inputs, B1 B2 adds to its outputs. r rank, c the inputs of one of the layer's groups, k… its
kernel.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Adapter, Layer, Member
from lorasmith.adapters.lora import product, way
from lorasmith.adapters.low_rank import product_norm, scale_of, split_rows
from lorasmith.adapters.parts import Parts, alpha_of, fitting, for_file, size_of
from lorasmith.ops.additive import updated
from lorasmith.rng import kaiming

A1, A2, B1, B2 = FACTORS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


class GLoRAAdapter(Adapter):
    """The adapter of one layer."""

    algorithm = "GLoRA"
    MARKS = frozenset(FACTORS)
    SUFFIXES = MARKS | {"alpha"}
    RANKED = {A2: 0, B2: 0}
    BY_OUTPUT = frozenset({B1})
    IS_ADDITIVE = False
    NEEDS_WEIGHT = True
    LYCORIS_ARGS = {"algo": "glora"}
    CAN_FUSE = False
    COMFYUI_BYPASS = False
    takes_base = False

    def __init__(self, layer: Layer, factors: Sequence[Tensor], alpha: float) -> None:
        """factors: a1 [c, r, 1…], a2 [r, c, 1…], b1 [n_out, r, 1…], b2 [r, c, k…]."""
        super().__init__()
        self.a1, self.a2, self.b1, self.b2 = (nn.Parameter(factor) for factor in factors)
        self.layer = layer
        self._alpha = alpha
        self.operation, self.build = way(layer, self.rank)

    @classmethod
    def new(cls, layer: Layer, rank: int, alpha: float | None, path: str, seed: int) -> "GLoRAAdapter":
        """The identity: a2 and b2 are 0, a1 and b1 uniform in ±1 / sqrt(rank), as LyCORIS's are."""
        shapes = _shapes(layer, rank)
        a1, b1 = (
            kaiming(seed, f"{path}.{part}", (shape[0], rank)).view(shape)
            for part, shape in zip(FACTORS, shapes, strict=True)
            if part in (A1, B1)
        )
        a2, b2 = (torch.zeros(shape, dtype=torch.float32) for shape in (shapes[1], shapes[3]))
        return cls(layer, (a1, a2, b1, b2), float(rank) if alpha is None else alpha)

    @classmethod
    def from_file(cls, layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> "GLoRAAdapter":
        """The adapter that a file holds for this layer; ValueError where its shapes do not fit; no alpha: scale 1."""
        rank = size_of(tensors, A2, 0)
        factors = [fitting(tensors, part, s) for part, s in zip(FACTORS, _shapes(layer, rank), strict=True)]
        return cls(layer, factors, alpha_of(tensors, rank))

    @property
    def rank(self) -> int:
        return len(self.a2)

    @property
    def alpha(self) -> float:
        return self._alpha

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None = None, base: nn.Module | None = None) -> Tensor:
        """x [..., n_in] or [B, n_in, …], y [..., n_out] or [B, n_out, …], bias [n_out] -> adapted y, in y's dtype.

        W A1 A2 x is what the layer makes of A1 A2 x, so that no weight is made.
        """
        assert base is not None
        scale = self.alpha / self.rank
        moved = base.forward(self._mixed(x)).to(y.dtype)
        if bias is not None:
            moved = moved - bias.to(y.dtype).view(-1, *[1] * len(self.layer.kernel))
        return updated(x, y + scale * moved, self.operation, (self.b2, self.b1), scale, self.build)

    def _mixed(self, x: Tensor) -> Tensor:
        """A1 A2 x, in each group of a convolution alike."""
        a1, a2 = (factor.flatten(1).to(x.dtype) for factor in (self.a1, self.a2))
        if self.layer.conv is None:
            return x @ a2.t() @ a1.t()
        channels_last = x.unflatten(1, (self.layer.groups, -1)).movedim(2, -1)
        return (channels_last @ a2.t() @ a1.t()).movedim(-1, 2).flatten(1, 2)

    def merged(self, weight: Tensor) -> Tensor:
        """W + s (W A1 A2 + B1 B2), float32."""
        a1, a2, b1, b2 = (factor.float() for factor in (self.a1, self.a2, self.b1, self.b2))
        change = torch.einsum("oi...,ij->oj...", weight.float(), a1.flatten(1) @ a2.flatten(1))
        return weight.float() + self.alpha / self.rank * (change + product(b2, b1, weight.shape))

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The four factors and alpha under LyCORIS's names."""
        return for_file({A1: self.a1, A2: self.a2, B1: self.b1, B2: self.b2}, self.alpha, dtype)

    @classmethod
    def delta_norm(cls, parts: Parts) -> float:
        """Of s B1 B2, which is what does not depend on the weight."""
        return product_norm(parts[B1], parts[B2]) * abs(scale_of(parts, len(parts[B2])))

    @classmethod
    def layer_sizes(cls, parts: Parts) -> tuple[int, int, tuple[int, ...] | None] | None:
        """The kernel too."""
        if B2 not in parts or parts[B2].ndim < 2:
            return None
        return size_of(parts, B1, 0), parts[B2].shape[1], tuple(parts[B2].shape[2:])

    @classmethod
    def fuse(cls, members: Sequence[Member]) -> dict[str, Tensor]:
        """ValueError."""
        raise ValueError("GLoRA changes the inputs of several layers in several ways, which one layer has one way for")

    @classmethod
    def split(cls, parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
        """Each member has its rows of B1 and all else."""
        rows = split_rows(parts, B1, [member.rows for member in members])
        return [{**parts, B1: own} for own in rows]

    @classmethod
    def to_peft(cls, parts: Parts) -> dict[str, Tensor] | None:
        """None: PEFT has no GLoRA."""
        return None


def _shapes(layer: Layer, rank: int) -> tuple[tuple[int, ...], ...]:
    """Of the four factors."""
    size, ones = layer.weight_shape[1], [1] * len(layer.kernel)
    return (size, rank, *ones), (rank, size, *ones), (layer.n_out, rank, *ones), (rank, *layer.weight_shape[1:])
