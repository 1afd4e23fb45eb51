"""LoKr (Yeh et al. 2024, "Navigating text-to-image customization", section 3.2): a delta w1 (x) w2, Kronecker product.

w1 [a, b], w2 [c, d, k…] with n_out = a c and n_in / g = b d; g the layer's groups, r rank, K the numbers in the kernel.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Adapter, Layer, Member
from lorasmith.adapters.low_rank import scale_of, scaled
from lorasmith.adapters.parts import Parts, alpha_of, fitting, for_file, idle_alpha, size_of
from lorasmith.ops.additive import Base, Build, Operation, Weights, as_they_are, updated
from lorasmith.ops.dense import DenseConv
from lorasmith.ops.kronecker import Kronecker
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear
from lorasmith.rng import kaiming

LEFT, RIGHT = ("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")
"""The parts with the rows of w1, and of w2."""


def factorized(size: int, factor: int | None) -> tuple[int, int]:
    """size -> (m, n), m n = size, m <= n: m = factor where that divides size, else the greatest divisor below.

    Without a factor, or with one beyond the square root that does not divide size, the pair nearest to a square. This
    is LyCORIS's rule, which shapes in its files depend on.
    """
    if factor is not None and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = min(math.isqrt(size), factor or size)
    m = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return m, size // m


class LoKrAdapter(Adapter):
    """The adapter of one layer: w1 and w2 each whole or as a product of two factors."""

    algorithm = "LoKr"
    MARKS = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})
    SUFFIXES = MARKS | {"alpha"}
    RANKED = {"lokr_w1_b": 0, "lokr_w2_b": 0}
    PEFT_SCALES = "lokr_w1"
    CORES = {"lokr_t2": ("lokr_w2_a", "lokr_w2_b")}
    BY_OUTPUT = frozenset(LEFT)
    LYCORIS_ARGS = {"algo": "lokr"}
    DIFFUSERS_READS = frozenset({"Flux2Transformer2DModel", "ZImageTransformer2DModel"})
    CAN_FUSE = False
    COMFYUI_BYPASS = False
    takes_base = True

    def __init__(self, layer: Layer, factors: Mapping[str, Tensor], alpha: float) -> None:
        """factors: lokr_w1 [a, b] or lokr_w1_a [a, r] and _b [r, b]; lokr_w2 [c, d, k…] or _a [c, r], _b [r, d K]."""
        super().__init__()
        self.layer = layer
        self.names = tuple(factors)
        self.factors = nn.ParameterList(list(factors.values()))
        self._alpha = alpha
        self._rank = _rank(factors)
        self.operation, self.build = _way(layer, factors)

    @classmethod
    def new(
        cls, layer: Layer, rank: int, alpha: float | None, path: str, seed: int, *, factor: int | None
    ) -> "LoKrAdapter":  # fmt: skip
        """The identity: w2 (or its second factor) is 0, the rest Kaiming's, drawn from (seed, path).

        w2 is decomposed at the rank where LyCORIS does so and that makes it smaller.
        """
        a, c = factorized(layer.n_out, factor)
        b, d = factorized(layer.weight_shape[1], factor)
        columns = d * math.prod(layer.kernel)
        factors = {"lokr_w1": kaiming(seed, f"{path}.lokr_w1", (a, b))}
        if 2 * rank < max(c, d) and rank * (c + columns) < c * columns:
            factors["lokr_w2_a"] = kaiming(seed, f"{path}.lokr_w2_a", (c, rank))
            factors["lokr_w2_b"] = torch.zeros(rank, columns, dtype=torch.float32)
        else:
            factors["lokr_w2"] = torch.zeros(c, d, *layer.kernel, dtype=torch.float32)
        return cls(layer, factors, float(rank) if alpha is None else alpha)

    @classmethod
    def from_file(cls, layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> "LoKrAdapter":
        """The adapter that a file holds for this layer, whatever its factor; ValueError where it does not fit."""
        factors, sizes = {}, []
        for name, kernel in (("lokr_w1", ()), ("lokr_w2", layer.kernel)):
            if name in tensors:
                rows, columns = size_of(tensors, name, 0), size_of(tensors, name, 1)
                factors[name] = fitting(tensors, name, (rows, columns, *kernel))
            else:
                flat = {suffix: t.flatten(1) if t.ndim > 2 else t for suffix, t in tensors.items()}
                rows, rank = size_of(flat, f"{name}_a", 0), size_of(flat, f"{name}_a", 1)
                columns = size_of(flat, f"{name}_b", 1) // math.prod(kernel)
                factors[f"{name}_a"] = fitting(flat, f"{name}_a", (rows, rank))
                factors[f"{name}_b"] = fitting(flat, f"{name}_b", (rank, columns * math.prod(kernel)))
            sizes.append((rows, columns))
        if unused := sorted(tensors.keys() - factors.keys() - {"alpha"}):
            raise ValueError(f"{', '.join(unused)} must not stand beside {', '.join(factors)}")
        product = tuple(one * other for one, other in zip(*sizes, strict=True))
        if product != layer.weight_shape[:2]:
            raise ValueError(
                f"lokr_w1 and lokr_w2 must make a weight of {list(layer.weight_shape[:2])}, got {list(product)}"
            )
        rank = _rank(factors)
        return cls(layer, factors, alpha_of(tensors, rank) if rank else idle_alpha(tensors))

    @property
    def rank(self) -> int | None:
        return self._rank

    @property
    def alpha(self) -> float | None:
        """Only of decomposed factors: two whole ones are used as they are."""
        return self._alpha if self.rank else None

    def forward(self, x: Tensor, y: Tensor | Base, bias: Tensor | None = None, base: nn.Module | None = None) -> Tensor:
        """x [..., n_in] or [B, n_in, …], y [..., n_out] or [B, n_out, …] -> adapted y, in y's dtype."""
        return updated(x, y, self.operation, tuple(self.factors), self._scale, self.build)

    @property
    def _scale(self) -> float:
        return self._alpha / self.rank if self.rank else 1.0

    def merged(self, weight: Tensor) -> Tensor:
        """W + scale w1 (x) w2, float32."""
        (delta,) = _delta(self.layer, self.names, *(factor.float() for factor in self.factors))
        return weight.float() + self._scale * delta.view(weight.shape)

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The factors and alpha under LyCORIS's names."""
        return for_file(dict(zip(self.names, self.factors, strict=True)), self._alpha, dtype)

    @classmethod
    def delta_norm(cls, parts: Parts) -> float:
        """|w1 (x) w2| = |w1| |w2|."""
        halves = [
            parts[half] if half in parts else parts[f"{half}_a"] @ parts[f"{half}_b"].flatten(1)
            for half in ("lokr_w1", "lokr_w2")
        ]
        rank = cls.rank_of(parts)
        return math.prod(float(half.norm()) for half in halves) * (1.0 if rank is None else abs(scale_of(parts, rank)))

    @classmethod
    def layer_sizes(cls, parts: Parts) -> tuple[int, int, tuple[int, ...] | None] | None:
        """With the kernel where w2 is whole."""
        halves = []
        for half in ("lokr_w1", "lokr_w2"):
            columns = parts.get(half, parts.get(f"{half}_b"))
            if columns is None or columns.ndim < 2:
                return None
            halves.append((size_of(parts, half if half in parts else f"{half}_a", 0), columns.shape[1]))
        n_out, n_in = (one * other for one, other in zip(*halves, strict=True))
        return n_out, n_in, tuple(parts["lokr_w2"].shape[2:]) if "lokr_w2" in parts else None

    @classmethod
    def fuse(cls, members: Sequence[Member]) -> dict[str, Tensor]:
        """ValueError."""
        raise ValueError(
            "Kronecker products of several layers make no Kronecker product of the one that they are there"
        )

    @classmethod
    def split(cls, parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
        """Each member has its rows of w1, where w2 is not cut."""
        rows = [member.rows for member in members]
        left = next((name for name in LEFT if name in parts), None)
        height = next((len(parts[name]) for name in RIGHT if name in parts and parts[name].ndim), 0)
        if left is None or not height or len(parts[left]) * height != sum(rows) or any(n % height for n in rows):
            raise ValueError(
                f"lokr_w2, of {height} rows, must fit into each of the layers of {list(rows)} rows it is for"
            )
        pieces = parts[left].split([n // height for n in rows])
        return [{**parts, left: piece.clone()} for piece in pieces]

    @classmethod
    def to_peft(cls, parts: Parts) -> dict[str, Tensor]:
        """Whole factors are used as they are."""
        rank = cls.rank_of(parts)
        found = {part: tensor for part, tensor in parts.items() if part != "alpha"}
        if rank is not None:
            right = next(part for part in RIGHT if part in parts)
            found[right] = scaled(parts[right], scale_of(parts, rank))
        return found


def _rank(factors: Mapping[str, Tensor]) -> int | None:
    """The inner dimension of the decomposed factor; None of two whole ones."""
    return next((factor.shape[1] for name, factor in factors.items() if name.endswith("_a")), None)


def _way(layer: Layer, factors: Mapping[str, Tensor]) -> tuple[Operation, Build]:
    """How the layer's delta is multiplied by."""
    names = tuple(factors)
    if names == ("lokr_w1", "lokr_w2_a", "lokr_w2_b") and factors["lokr_w1"].numel() == 1:
        return LowRankLinear() if layer.conv is None else LowRankConv(layer.conv), partial(_low_rank, layer)
    if layer.conv is not None and layer.groups > 1:
        return DenseConv(layer.conv), partial(_delta, layer, names)
    plain = not layer.kernel and not any(name.startswith("lokr_w1_") for name in names)
    return Kronecker(layer.conv), as_they_are if plain else partial(_weights, layer, names)


def _half(by_name: Mapping[str, Tensor], name: str) -> Tensor:
    return by_name[name] if name in by_name else by_name[f"{name}_a"] @ by_name[f"{name}_b"]


def _weights(layer: Layer, names: tuple[str, ...], *factors: Tensor) -> Weights:
    """The factors -> w1 [a, b], w2 [c, d, k…]; or w1, w2_a [c, r], w2_b [r, d, k…]."""
    by_name = dict(zip(names, factors, strict=True))
    *above, below = (factor for name, factor in by_name.items() if name.startswith("lokr_w2"))
    return _half(by_name, "lokr_w1"), *above, below.view(len(below), -1, *layer.kernel)


def _low_rank(layer: Layer, w1: Tensor, w2_a: Tensor, w2_b: Tensor) -> Weights:
    """The factors, w1 a single number -> down, up: w2 would be as large as the layer, and is thus never made."""
    return w2_b.view(-1, *layer.weight_shape[1:]), (w1 * w2_a).view(*w2_a.shape, *[1] * len(layer.kernel))


def _delta(layer: Layer, names: tuple[str, ...], *factors: Tensor) -> Weights:
    """The factors -> the delta, in the weight's shape, unscaled: the groups of a convolution may cut across w1."""
    by_name = dict(zip(names, factors, strict=True))
    w1, w2 = _half(by_name, "lokr_w1"), _half(by_name, "lokr_w2")
    ones = [1] * len(layer.kernel)
    return (torch.kron(w1.view(*w1.shape, *ones), w2.view(len(w2), -1, *layer.kernel)),)
