"""The algorithms as settings. No torch: settings are read and refused before it is imported.

What each of them builds is in `adapters/`.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lorasmith.component import Component, named

if TYPE_CHECKING:  # torch, which takes seconds
    from torch import nn

    from lorasmith.adapters.base import Layer
    from lorasmith.adapters.dora import DoRAAdapter
    from lorasmith.adapters.loha import LoHaAdapter
    from lorasmith.adapters.lokr import LoKrAdapter
    from lorasmith.adapters.lora import LoRAAdapter
    from lorasmith.adapters.oft import OFTAdapter

Rank = Annotated[int, Field(ge=1, le=128, description="inner dimension of the adapters")]
Alpha = Annotated[
    float | None,
    Field(gt=0, le=1e6, allow_inf_nan=False, description="the update is scaled by alpha / rank; none: the rank"),
]
BlockSize = Annotated[int, Field(ge=1, le=128, description="size of a block, or their number where that is smaller")]
Constraint = Annotated[
    float | None,
    Field(
        gt=0, le=1e6, allow_inf_nan=False, description="limit of Q's norm, times the layer's outputs; none: no limit"
    ),
]


class LoRA(Component):
    """Low-rank adapters: y + (alpha / rank) up(down(x))."""

    name: Literal["LoRA"] = "LoRA"
    rank: Rank = 8
    alpha: Alpha = None

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "LoRAAdapter":
        """A new adapter, the identity."""
        from lorasmith.adapters.lora import LoRAAdapter

        return LoRAAdapter.new(layer, self.rank, self.alpha, path, seed)


class LoHa(Component):
    """Hadamard products of two low-rank matrices: y + (alpha / rank) ((w1_a w1_b) * (w2_a w2_b)) x."""

    name: Literal["LoHa"] = "LoHa"
    rank: Rank = 8
    alpha: Alpha = None

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "LoHaAdapter":
        """A new adapter, the identity."""
        from lorasmith.adapters.loha import LoHaAdapter

        return LoHaAdapter.new(layer, self.rank, self.alpha, path, seed)


class LoKr(Component):
    """Kronecker products: y + scale (w1 (x) w2) x."""

    name: Literal["LoKr"] = "LoKr"
    rank: Rank = 8
    alpha: Alpha = None
    factor: int | None = Field(
        default=None, ge=1, le=65536, description="rows and columns of the smaller Kronecker factor; none: near square"
    )

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "LoKrAdapter":
        """A new adapter, the identity."""
        from lorasmith.adapters.lokr import LoKrAdapter

        return LoKrAdapter.new(layer, self.rank, self.alpha, path, seed, factor=self.factor)


class OFT(Component):
    """Orthogonal adapters: y + (R^T - I)(y - bias) in blocks."""

    name: Literal["OFT"] = "OFT"
    rank: BlockSize = 8
    alpha: Constraint = None

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "OFTAdapter":
        """A new adapter, the identity; ValueError where its blocks would be single numbers, which cannot turn."""
        from lorasmith.adapters.oft import OFTAdapter

        return OFTAdapter.new(layer, self.rank, self.alpha)


class DoRA(Component):
    """Low-rank adapters and a length for each output: m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|."""

    name: Literal["DoRA"] = "DoRA"
    rank: Rank = 8
    alpha: Alpha = None

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "DoRAAdapter":
        """A new adapter, the identity."""
        from lorasmith.adapters.dora import DoRAAdapter

        assert base is not None
        return DoRAAdapter.new(layer, self.rank, self.alpha, path, seed, base=base)


Algorithm = Annotated[
    LoRA | LoHa | LoKr | OFT | DoRA, Field(discriminator="name", description="the kind of adapter"), named("LoRA")
]
