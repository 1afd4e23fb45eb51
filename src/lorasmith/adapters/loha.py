"""LoHa (Hyeon-Woo et al. 2022, "FedPara", eq. 2): a delta (w1_a w1_b) * (w2_a w2_b), elementwise, of rank up to r^2.

r rank, K the numbers in the kernel, g the layer's groups.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Adapter, Layer, Member
from lorasmith.adapters.low_rank import fuse_pairs, scale_of, split_pairs
from lorasmith.adapters.parts import Parts, alpha_of, fitting, for_file, size_of
from lorasmith.ops.additive import Base, Build, Operation, Weights, updated
from lorasmith.ops.dense import DenseConv, DenseLinear
from lorasmith.ops.face_splitting import pairs
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear
from lorasmith.rng import Purpose, normal, path_number

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
PAIRS = (FACTORS[:2], FACTORS[2:])


class LoHaAdapter(Adapter):
    """The adapter of one layer."""

    algorithm = "LoHa"
    MARKS = frozenset(FACTORS)
    SUFFIXES = MARKS | {"alpha"}
    RANKED = {"hada_w1_b": 0, "hada_w2_b": 0}
    CORES = {"hada_t1": PAIRS[0], "hada_t2": PAIRS[1]}
    BY_OUTPUT = frozenset({"hada_w1_a", "hada_w2_a"})
    LYCORIS_ARGS = {"algo": "loha"}
    takes_base = True

    def __init__(self, layer: Layer, factors: list[Tensor], alpha: float) -> None:
        """factors w1_a [n_out, r], w1_b [r, n_in / g * K], w2_a and w2_b alike."""
        super().__init__()
        self.layer = layer
        self.factors = nn.ParameterList(factors)
        self._alpha = alpha
        self.operation, self.build = _way(layer, factors[0].shape[1])

    @classmethod
    def new(cls, layer: Layer, rank: int, alpha: float | None, path: str, seed: int) -> "LoHaAdapter":
        """The identity: w2_a is 0, the others normal with LyCORIS's deviations, from (seed, path)."""
        stds = (0.1, 1.0, 0.0, 1.0)
        factors = [
            std * normal(seed, Purpose.INIT, path_number(f"{path}.{suffix}"), shape)
            if std
            else torch.zeros(shape, dtype=torch.float32)
            for suffix, std, shape in zip(FACTORS, stds, _shapes(layer, rank), strict=True)
        ]
        return cls(layer, factors, float(rank) if alpha is None else alpha)

    @classmethod
    def from_file(cls, layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> "LoHaAdapter":
        """The adapter that a file holds for this layer; ValueError where its shapes do not fit; no alpha: scale 1."""
        rank = size_of(tensors, "hada_w1_a", -1)
        shapes = _shapes(layer, rank)
        factors = [fitting(tensors, suffix, shape) for suffix, shape in zip(FACTORS, shapes, strict=True)]
        return cls(layer, factors, alpha_of(tensors, rank))

    @property
    def rank(self) -> int:
        return self.factors[0].shape[1]

    @property
    def alpha(self) -> float:
        return self._alpha

    def forward(self, x: Tensor, y: Tensor | Base, bias: Tensor | None = None, base: nn.Module | None = None) -> Tensor:
        """x [..., n_in] or [B, n_in, …], y [..., n_out] or [B, n_out, …] -> adapted y, in y's dtype."""
        return updated(x, y, self.operation, tuple(self.factors), self.alpha / self.rank, self.build)

    def merged(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank) (w1_a w1_b) * (w2_a w2_b), float32."""
        (delta,) = _product(self.layer, *(factor.float() for factor in self.factors))
        return weight.float() + self.alpha / self.rank * delta

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The four factors and alpha under LyCORIS's names."""
        return for_file(dict(zip(FACTORS, self.factors, strict=True)), self.alpha, dtype)

    @classmethod
    def delta_norm(cls, parts: Parts) -> float:
        """Of the delta itself."""
        delta = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        return float(delta.norm()) * abs(scale_of(parts, len(parts["hada_w1_b"])))

    @classmethod
    def layer_sizes(cls, parts: Parts) -> tuple[int, int, tuple[int, ...] | None] | None:
        """Without the kernel."""
        if "hada_w1_b" not in parts or parts["hada_w1_b"].ndim < 2:
            return None
        return size_of(parts, "hada_w1_a", 0), parts["hada_w1_b"].shape[1], None

    @classmethod
    def fuse(cls, members: Sequence[Member]) -> dict[str, Tensor]:
        """A diagonal of blocks of each product."""
        return fuse_pairs(members, PAIRS)

    @classmethod
    def split(cls, parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
        """A member's rows, and its blocks where there are diagonals of them."""
        return split_pairs(parts, members, PAIRS)

    @classmethod
    def to_peft(cls, parts: Parts) -> dict[str, Tensor] | None:
        """None: diffusers loads no LoHa."""
        return None


def _shapes(layer: Layer, rank: int) -> tuple[tuple[int, int], ...]:
    a, b = (layer.n_out, rank), (rank, layer.fan_in)
    return (a, b, a, b)


def _way(layer: Layer, rank: int) -> tuple[Operation, Build]:
    """The cheaper way to multiply by the delta: with two factors of rank r^2, or with the delta itself.

    The product of two matrices of rank r, element by element, is up down with the r^2 columns of up, and rows of down,
    that are products of a pair of theirs (face-splitting products: Slyusar 1999). A weight's gradient is then never
    made.
    """
    if layer.is_cheaper_in_two(rank**2):
        operation = LowRankLinear() if layer.conv is None else LowRankConv(layer.conv)
        return operation, partial(_pairs, layer)
    return DenseLinear() if layer.conv is None else DenseConv(layer.conv), partial(_product, layer)


def _pairs(layer: Layer, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Weights:
    """The factors -> down [r^2, n_in / g, k…], up [n_out, r^2, 1…]."""
    down = pairs(_by_taps(layer, w1_b), _by_taps(layer, w2_b))
    up = pairs(w1_a.t(), w2_a.t()).t()
    taps_last = down.view(-1, *layer.kernel, layer.weight_shape[1]).movedim(-1, 1)
    return taps_last, up.view(*up.shape, *[1] * len(layer.kernel))


def _by_taps(layer: Layer, rows: Tensor) -> Tensor:
    """rows [r, n_in / g * K] -> [r, K * n_in / g]: as they lie in memory with the channels last."""
    return rows.unflatten(1, (layer.weight_shape[1], -1)).mT.flatten(1) if layer.kernel else rows


def _product(layer: Layer, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Weights:
    """The factors -> the delta, in the weight's shape, unscaled."""
    return (((w1_a @ w1_b) * (w2_a @ w2_b)).view(layer.weight_shape),)
