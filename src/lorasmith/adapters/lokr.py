"""LoKr (Yeh et al. 2024, "Navigating text-to-image customization", section 3.2): a delta w1 (x) w2, Kronecker product.

w1 [a, b], w2 [c, d, k…] with n_out = a c and n_in / g = b d; g the layer's groups, r rank, K the numbers in the kernel.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Layer, alpha_of, fitting, for_file, idle_alpha, size_of
from lorasmith.ops.additive import Base, Build, Operation, Weights, as_they_are, updated
from lorasmith.ops.dense import DenseConv
from lorasmith.ops.kronecker import Kronecker
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear
from lorasmith.rng import kaiming


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


class LoKrAdapter(nn.Module):
    """The adapter of one layer: w1 and w2 each whole or as a product of two factors."""

    MARKS = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})
    SUFFIXES = MARKS | {"alpha"}
    algorithm = "LoKr"
    takes_base = True

    def __init__(self, layer: Layer, factors: Mapping[str, Tensor], alpha: float) -> None:
        """factors: lokr_w1 [a, b] or lokr_w1_a [a, r] and _b [r, b]; lokr_w2 [c, d, k…] or _a [c, r], _b [r, d K]."""
        super().__init__()
        self.layer = layer
        self.names = tuple(factors)
        self.factors = nn.ParameterList(list(factors.values()))
        self._alpha = alpha
        self.rank = _rank(factors)
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
