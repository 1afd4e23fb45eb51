"""DoRA with a length for each input, not each output, as OneTrainer and LyCORIS (`wd_on_out=False`) can write it.

W becomes (W + s B A) D, D = m / |W + s B A| for each input's column, which is the same as scaling the inputs by D. Such
adapters come from files alone. r rank, c the inputs of one of the layer's groups, k… its kernel.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Layer
from lorasmith.adapters.dora_base import AnyDoRAAdapter
from lorasmith.adapters.frozen_weight import column_lengths
from lorasmith.adapters.lora import product, read_factors, way
from lorasmith.adapters.parts import DOWN, SCALE, UP, alpha_of, fitting, for_file
from lorasmith.ops.additive import updated


def is_over_inputs(layer: Layer, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file's dora_scale has a number for each input of this layer."""
    found = tuple(tensors[SCALE].shape) if SCALE in tensors else ()
    return len(found) > 1 and found != _like(layer, layer.n_out, 1) and found[:2] == (1, layer.weight_shape[1])


class InputDoRAAdapter(AnyDoRAAdapter):
    """The adapter of one layer."""

    LYCORIS_ARGS = {**AnyDoRAAdapter.LYCORIS_ARGS, "wd_on_output": "False"}
    takes_base = False

    def __init__(self, layer: Layer, factors: tuple[Tensor, Tensor, Tensor], lengths: Tensor, alpha: float) -> None:
        """factors: down [r, n_in] or [r, c, k…], up [n_out, r] or [n_out, r, 1…], change [c].

        lengths [c]: those of the columns of the layer's own weight, which m is a change of.
        """
        super().__init__()
        self.down, self.up, self.change = (nn.Parameter(factor) for factor in factors)
        self.lengths = lengths
        self._alpha = alpha
        self.layer = layer
        self.operation, self.build = way(layer, len(self.down))

    @classmethod
    def from_file(
        cls, layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None
    ) -> "InputDoRAAdapter":
        """The adapter that a file holds for this layer, its dora_scale being m; ValueError where it does not fit."""
        assert base is not None
        down, up = read_factors(layer, tensors)
        size = layer.weight_shape[1]
        is_matrix = tensors[SCALE].ndim == 2 and math.prod(layer.kernel) == 1  # as factors of such convolutions may be
        magnitudes = fitting(tensors, SCALE, (1, size) if is_matrix else _like(layer, 1, size)).flatten()
        lengths = column_lengths(base)
        return cls(layer, (down, up, magnitudes.to(lengths.dtype) - lengths), lengths, alpha_of(tensors, len(down)))

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def alpha(self) -> float:
        return self._alpha

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None = None, base: nn.Module | None = None) -> Tensor:
        """x [..., n_in] or [B, n_in, …], y [..., n_out] or [B, n_out, …], bias [n_out] -> adapted y, in y's dtype."""
        assert base is not None
        delta = self._scale * product(self.down.detach().float(), self.up.detach().float(), self.layer.weight_shape)
        ratio = self._magnitudes() / column_lengths(base, delta).to(self.change.device)
        inputs = ratio.repeat(self.layer.groups).view(-1, *[1] * len(self.layer.kernel))
        turned = base.forward(x * (inputs - 1).to(x.dtype)).to(y.dtype)
        if bias is not None:
            turned = turned - bias.to(y.dtype).view(-1, *[1] * len(self.layer.kernel))
        return updated(
            x * inputs.to(x.dtype), y + turned, self.operation, (self.down, self.up), self._scale, self.build
        )

    def merged(self, weight: Tensor) -> Tensor:
        """(W + s B A) D, float32."""
        changed = weight.float() + self._scale * product(self.down.float(), self.up.float(), weight.shape)
        norms = torch.linalg.vector_norm(changed, dim=(0, *range(2, weight.ndim)))
        return changed * (self._magnitudes().detach() / norms).view(1, -1, *[1] * (weight.ndim - 2)).float()

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """down, up and alpha under kohya's names, m in float32 under LyCORIS's."""
        tensors = for_file({DOWN: self.down, UP: self.up}, self.alpha, dtype)
        magnitudes = self._magnitudes().detach().to("cpu", torch.float32)
        return {**tensors, SCALE: magnitudes.view(1, -1, *[1] * (self.up.ndim - 2))}

    @property
    def _scale(self) -> float:
        return self.alpha / self.rank

    def _magnitudes(self) -> Tensor:
        """m [c], in float32 or wider, on the parameters' device."""
        if self.lengths.device != self.change.device:
            self.lengths = self.lengths.to(self.change.device)
        return self.lengths + self.change


def _like(layer: Layer, rows: int, columns: int) -> tuple[int, ...]:
    return (rows, columns, *[1] * len(layer.kernel))
