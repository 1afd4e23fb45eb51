"""The nearest matrices of a lower rank (Eckart and Young 1936), and what is lost with them.

m rows, n columns, r rank, q the rank that is kept; all in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """left [m,k] diag(values [k]) right [k,n], values descending."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of_product(cls, up: Tensor, down: Tensor) -> "Decomposition":
        """up [m,r] down [r,n], which is never made: QR of both leaves an r x r matrix."""
        left, upper = torch.linalg.qr(up.double())
        right, lower = torch.linalg.qr(down.double().T)
        inner, values, outer = torch.linalg.svd(upper @ lower.T)
        size = len(values)
        return cls(left @ inner[:, :size], values, outer[:size] @ right.T)

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> "Decomposition":
        """matrix [m,n], by the eigenvectors of its products with itself on the shorter side.

        Values below about 1e-8 of the greatest are not told from zero, which float32 could not hold beside it either.
        """
        matrix = matrix.double()
        if matrix.shape[0] > matrix.shape[1]:
            turned = cls.of_matrix(matrix.T)
            return cls(turned.right.T, turned.values, turned.left.T)
        squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
        left = vectors.flip(1)
        values = squares.flip(0).clamp(min=0).sqrt()
        return cls(left, values, left.T @ matrix / values.clamp(min=1e-300)[:, None])

    def factors(self, rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """up [m,q], down [q,n]: the nearest product of this rank, times scale; each takes half of the values."""
        roots = self.values[:rank].sqrt()
        return self.left[:, :rank] * (roots * scale), roots[:, None] * self.right[:rank]


@dataclass(frozen=True)
class Cut:
    """How much is kept: a rank, or a share of the energy (of the sum of squared singular values)."""

    rank: int | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.keep is None):
            raise ValueError("either rank or keep must be given, got " + ("none" if self.rank is None else "both"))
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be 1 or more, got {self.rank}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep:g}")

    def kept(self, values: Tensor) -> int:
        """How many of the singular values, descending; 1 at least."""
        if self.rank is not None:
            return min(self.rank, len(values))
        assert self.keep is not None
        energy = values.square().cumsum(0)
        # rounding of the sum must not ask for values of zero
        return min(len(values), 1 + int((energy < self.keep * energy[-1] * (1 - 1e-12)).sum()))

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.rank is not None else f"keep {self.keep:g}"


@dataclass
class Losses:
    """What was lost of each layer: squared Frobenius norms of the error and of what there was."""

    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def add(self, layer: str, rank: int, error: float, norm: float) -> None:
        self.ranks[layer] = rank
        self.layers[layer] = error, norm

    @property
    def overall(self) -> float:
        """The relative error of all layers together."""
        errors, norms = (sum(pair[i] for pair in self.layers.values()) for i in (0, 1))
        return math.sqrt(errors / norms) if norms else 0.0

    def worst(self, number: int = 5) -> Sequence[tuple[str, float]]:
        """The layers that lose most, and their relative errors; none that lose nothing."""
        relative = [(layer, math.sqrt(e / n)) for layer, (e, n) in self.layers.items() if e > 1e-12 * n > 0]
        return sorted(relative, key=lambda pair: (-pair[1], pair[0]))[:number]


def squared_error(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of two products up [m,r] down [r,n]: the squared norm of their difference, and of the first; neither is made."""
    ups, downs = ([pair[i].double() for pair in (one, other)] for i in (0, 1))

    def inner(i: int, j: int) -> float:
        return float(((ups[i].T @ ups[j]) * (downs[i] @ downs[j].T)).sum())

    return max(0.0, inner(0, 0) + inner(1, 1) - 2 * inner(0, 1)), max(0.0, inner(0, 0))
