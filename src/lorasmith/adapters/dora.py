"""DoRA (Liu et al. 2024, "Weight-Decomposed Low-Rank Adaptation", eq. 5): W becomes m (W + s B A) / |W + s B A|.

One length m for each output's row of W; s = alpha / rank. What is trained beside A and B is the change of m: it starts
at 0, so that the layer stays exactly as it is in 16 bits too, and weight decay leads back to the layer's own lengths.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Layer
from lorasmith.adapters.dora_base import AnyDoRAAdapter
from lorasmith.adapters.dora_inputs import InputDoRAAdapter, is_over_inputs
from lorasmith.adapters.frozen_weight import row_products, row_squares
from lorasmith.adapters.lora import new_factors, product, read_factors
from lorasmith.adapters.parts import DOWN, SCALE, UP, VECTOR, alpha_of, fitting, for_file
from lorasmith.ops.additive import Base, Operation
from lorasmith.ops.dora import SMALLEST, decomposed, lengths_of, row_norms
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear


class DoRAAdapter(AnyDoRAAdapter):
    """The adapter of one layer. r rank, g the layer's groups, k… its kernel."""

    takes_base = True

    def __init__(self, layer: Layer, factors: tuple[Tensor, Tensor, Tensor], squares: Tensor, alpha: float) -> None:
        """factors: down [r, n_in] or [r, n_in / g, k…], up [n_out, r] or [n_out, r, 1…], change [n_out].

        squares [n_out]: the squared lengths of the layer's rows, which m is a change of.
        """
        super().__init__()
        self.down, self.up, self.change = (nn.Parameter(factor) for factor in factors)
        self.squares = squares
        self._alpha = alpha
        self.operation: Operation = LowRankLinear() if layer.conv is None else LowRankConv(layer.conv)

    @classmethod
    def new(
        cls, layer: Layer, rank: int, alpha: float | None, path: str, seed: int, *, base: nn.Module
    ) -> "DoRAAdapter":  # fmt: skip
        """The identity; A is that of a LoRA of this seed and path."""
        squares = row_squares(base)
        down, up = new_factors(layer, rank, path, seed)
        return cls(layer, (down, up, torch.zeros_like(squares)), squares, float(rank) if alpha is None else alpha)

    @classmethod
    def from_file(cls, layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> AnyDoRAAdapter:
        """The adapter that a file holds for this layer, its dora_scale being m; ValueError where it does not fit."""
        if is_over_inputs(layer, tensors):
            return InputDoRAAdapter.from_file(layer, tensors, base)
        assert base is not None
        squares = row_squares(base)
        down, up = read_factors(layer, tensors)
        change = _magnitudes(layer, tensors).to(squares.dtype) - lengths_of(squares)
        return cls(layer, (down, up, change), squares, alpha_of(tensors, len(down)))

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def alpha(self) -> float:
        return self._alpha

    def forward(self, x: Tensor, y: Tensor | Base, bias: Tensor | None = None, base: nn.Module | None = None) -> Tensor:
        """x [..., n_in] or [B, n_in, …], y [..., n_out] or [B, n_out, …], bias [n_out] -> adapted y, in y's dtype."""
        assert base is not None
        norms, lengths = self.norms(base), lengths_of(self._own_squares())
        factors = self.down, self.up, self.change
        return decomposed(x, y, bias, self.operation, factors, scale=self._scale, norms=norms, lengths=lengths)

    def norms(self, base: nn.Module) -> Tensor:
        """The lengths [n_out] of the rows of W + s B A, a constant."""
        return row_norms(self._own_squares(), row_products(base, self.down), (self.down, self.up), self._scale)

    def magnitudes(self) -> Tensor:
        """m [n_out], in float32 or wider."""
        return lengths_of(self._own_squares()) + self.change.detach()

    def merged(self, weight: Tensor) -> Tensor:
        """m (W + s B A) / |W + s B A|, float32."""
        updated = weight.float() + self._scale * product(self.down.float(), self.up.float(), weight.shape)
        lengths = torch.linalg.vector_norm(updated.flatten(1), dim=1).square().clamp(min=SMALLEST).sqrt()
        return updated * (self.magnitudes() / lengths).view(-1, *[1] * (weight.ndim - 1)).float()

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """down, up and alpha under kohya's names, m under LyCORIS's.

        m is in float32: its change is small beside it, and 16 bits would hide that.
        """
        tensors = for_file({DOWN: self.down, UP: self.up}, self.alpha, dtype)
        shape = (-1, *[1] * (self.up.ndim - 1))
        return {**tensors, SCALE: self.magnitudes().to("cpu", torch.float32).view(shape)}

    @property
    def _scale(self) -> float:
        return self.alpha / self.rank

    def _own_squares(self) -> Tensor:
        """The squares, on the parameters' device."""
        if self.squares.device != self.change.device:
            self.squares = self.squares.to(self.change.device)
        return self.squares


def _magnitudes(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """A file's m [n_out]; ValueError where it has none, or two."""
    if SCALE in tensors and VECTOR in tensors:
        raise ValueError(f"{SCALE} must not stand beside {VECTOR}")
    ones = (1,) * len(layer.kernel)
    if VECTOR in tensors:
        return fitting(tensors, VECTOR, (1, layer.n_out, *ones) if ones else (layer.n_out,)).flatten()
    shape = (layer.n_out, 1, *ones)
    found = tuple(tensors[SCALE].shape) if SCALE in tensors else shape
    is_matrix = found == shape[:2] and math.prod(layer.kernel) == 1  # as factors of such convolutions may be
    return fitting(tensors, SCALE, found if is_matrix else shape).flatten()
