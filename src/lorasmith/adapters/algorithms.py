"""The algorithms as settings, and the list of them. No torch: settings are read and refused before it is imported.

What each of them computes, and all else that is known of it, is its adapter's class.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import Field

from lorasmith.component import Component, named

if TYPE_CHECKING:  # torch, which takes seconds
    from torch import nn

    from lorasmith.adapters.base import Adapter, Layer
    from lorasmith.adapters.dora import DoRAAdapter
    from lorasmith.adapters.glora import GLoRAAdapter
    from lorasmith.adapters.loha import LoHaAdapter
    from lorasmith.adapters.lokr import LoKrAdapter
    from lorasmith.adapters.lora import LoRAAdapter
    from lorasmith.adapters.oft import OFTAdapter

Rank = Annotated[int, Field(ge=1, le=128, description="inner dimension of the adapters")]
Alpha = Annotated[
    float | None,
    Field(gt=0, le=1e6, allow_inf_nan=False, description="the update is scaled by alpha / rank; none: the rank"),
]
BlockSize = Annotated[
    int, Field(ge=1, le=128, description="size of a block, or number of blocks, whichever makes smaller blocks")
]
Constraint = Annotated[
    float | None,
    Field(
        gt=0, le=1e6, allow_inf_nan=False, description="limit on the norm of Q, per output of the layer; none: no limit"
    ),
]
KOHYA_MODELS = ("flux", "wan", "sd3", "qwen_image", "zimage", "flux_2", "lumina")
"""The models that kohya's tools have a module of LoRAs of their own for."""


class AdapterSettings(Component, ABC):
    """What is set of an algorithm."""

    OTHER_NAMES: ClassVar[Mapping[str, str]]
    """{what other trainers call it, in lower case: what is typed here, its name or whole settings}."""

    @classmethod
    @abstractmethod
    def adapter(cls) -> "type[Adapter]":
        """The class of its adapters, which imports torch."""

    @abstractmethod
    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "Adapter":
        """A new adapter, the identity; ValueError where there can be none. base: the layer itself."""


class LoRA(AdapterSettings):
    """Low-rank adapters: y + (alpha / rank) up(down(x))."""

    OTHER_NAMES = {
        **dict.fromkeys(("networks.lora", "standard", "kohya dylora"), "LoRA"),
        **dict.fromkeys((f"networks.lora_{model}" for model in KOHYA_MODELS), "LoRA"),
        **dict.fromkeys(("locon", "lycoris/locon", "kohya locon"), "--adapter LoRA --targets.preset all"),
    }
    name: Literal["LoRA"] = "LoRA"
    rank: Rank = 8
    alpha: Alpha = None

    @classmethod
    def adapter(cls) -> "type[LoRAAdapter]":
        from lorasmith.adapters.lora import LoRAAdapter

        return LoRAAdapter

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "LoRAAdapter":
        """A new adapter, the identity."""
        return self.adapter().new(layer, self.rank, self.alpha, path, seed)


class LoHa(AdapterSettings):
    """Hadamard products of two low-rank matrices: y + (alpha / rank) ((w1_a w1_b) * (w2_a w2_b)) x."""

    OTHER_NAMES = {"lycoris/loha": "LoHa"}
    name: Literal["LoHa"] = "LoHa"
    rank: Rank = 8
    alpha: Alpha = None

    @classmethod
    def adapter(cls) -> "type[LoHaAdapter]":
        from lorasmith.adapters.loha import LoHaAdapter

        return LoHaAdapter

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "LoHaAdapter":
        """A new adapter, the identity."""
        return self.adapter().new(layer, self.rank, self.alpha, path, seed)


class LoKr(AdapterSettings):
    """Kronecker products: y + scale (w1 (x) w2) x."""

    OTHER_NAMES = {"lycoris/lokr": "LoKr"}
    name: Literal["LoKr"] = "LoKr"
    rank: Rank = 8
    alpha: Alpha = None
    factor: int | None = Field(
        default=None, ge=1, le=65536, description="rows and columns of the smaller Kronecker factor; none: near square"
    )

    @classmethod
    def adapter(cls) -> "type[LoKrAdapter]":
        from lorasmith.adapters.lokr import LoKrAdapter

        return LoKrAdapter

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "LoKrAdapter":
        """A new adapter, the identity."""
        return self.adapter().new(layer, self.rank, self.alpha, path, seed, factor=self.factor)


class OFT(AdapterSettings):
    """Orthogonal adapters: y + (R^T - I)(y - bias) in blocks."""

    OTHER_NAMES = dict.fromkeys(("networks.oft", "diag-oft", "boft", "oft_2", "lycoris/diag-oft"), "OFT")
    name: Literal["OFT"] = "OFT"
    rank: BlockSize = 8
    alpha: Constraint = None

    @classmethod
    def adapter(cls) -> "type[OFTAdapter]":
        from lorasmith.adapters.oft import OFTAdapter

        return OFTAdapter

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "OFTAdapter":
        """A new adapter, the identity; ValueError where its blocks would be single numbers, which cannot rotate."""
        return self.adapter().new(layer, self.rank, self.alpha)


class DoRA(AdapterSettings):
    """Low-rank adapters with a magnitude for each output: m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|."""

    OTHER_NAMES = {}
    name: Literal["DoRA"] = "DoRA"
    rank: Rank = 8
    alpha: Alpha = None

    @classmethod
    def adapter(cls) -> "type[DoRAAdapter]":
        from lorasmith.adapters.dora import DoRAAdapter

        return DoRAAdapter

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "DoRAAdapter":
        """A new adapter, the identity."""
        assert base is not None
        return self.adapter().new(layer, self.rank, self.alpha, path, seed, base=base)


class GLoRA(AdapterSettings):
    """Low-rank changes of a layer's inputs and outputs: y + (alpha / rank) (W a1(a2(x)) + b1(b2(x)))."""

    OTHER_NAMES = {"glora": "GLoRA", "lycoris/glora": "GLoRA"}
    name: Literal["GLoRA"] = "GLoRA"
    rank: Rank = 8
    alpha: Alpha = None

    @classmethod
    def adapter(cls) -> "type[GLoRAAdapter]":
        from lorasmith.adapters.glora import GLoRAAdapter

        return GLoRAAdapter

    def build(self, layer: "Layer", path: str, seed: int, base: "nn.Module | None" = None) -> "GLoRAAdapter":
        """A new adapter, the identity."""
        return self.adapter().new(layer, self.rank, self.alpha, path, seed)


AnyAlgorithm = LoRA | LoHa | LoKr | OFT | DoRA | GLoRA
ALGORITHMS: tuple[type[AdapterSettings], ...] = get_args(AnyAlgorithm)
AlgorithmName = Literal["LoRA", "LoHa", "LoKr", "OFT", "DoRA", "GLoRA"]
Algorithm = Annotated[AnyAlgorithm, Field(discriminator="name", description="the kind of adapter"), named("LoRA")]

UNREAD = {
    "on_input": "of (IA)^3", "ia3_l": "of PEFT's (IA)^3",
    "oft_R.weight": "of PEFT's OFT, which turns inputs in a way that its configuration alone states",
    "oft_r": "of an OFT of PEFT before 0.15", "boft_R": "of PEFT's BOFT", "boft_s": "of PEFT's BOFT",
    "vera_lambda_b": "of VeRA", "vera_lambda_d": "of VeRA", "hra_u": "of HRA", "lora_E": "of AdaLoRA",
    "oft_diag": "of an OFT whose blocks are the rotations themselves",
    "rescale": "of an OFT that scales too",
    "scalar": "a factor of LyCORIS that its own files have multiplied in",
    "lora_embedding_A": "of a table of embeddings", "lora_embedding_B": "of a table of embeddings",
    "set_weight": "which replaces the layer's weight",
    "reshape_weight": "which gives the layer's weight another shape",
    "weight": "a whole weight, no change of one", "bias": "a whole bias, no change of one",
    "scale": "a whole weight, no change of one",
    "diff_m": "a change of a block's modulation, which is no layer's weight",
    "lora_down.bias": "a bias beside dora_scale", "lora_up.bias": "a bias beside dora_scale",
}  # fmt: skip
"""{a part that other programs write and that is not read: what it is}."""
