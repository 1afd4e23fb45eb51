"""The algorithms, one a file, and what they share."""

from collections.abc import Collection, Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from lorasmith.adapters.dora import DoRA, DoRAAdapter
from lorasmith.adapters.layer import Adapter, Layer
from lorasmith.adapters.loha import LoHa, LoHaAdapter
from lorasmith.adapters.lokr import LoKr, LoKrAdapter
from lorasmith.adapters.lora import LoRA, LoRAAdapter
from lorasmith.adapters.oft import OFT, OFTAdapter
from lorasmith.component import named

Algorithm = Annotated[
    LoRA | LoHa | LoKr | OFT | DoRA, Field(discriminator="name", description="the kind of adapter"), named("LoRA")
]
Kind = type[LoRAAdapter | LoHaAdapter | LoKrAdapter | OFTAdapter | DoRAAdapter]
ADAPTERS: tuple[Kind, ...] = (LoRAAdapter, LoHaAdapter, LoKrAdapter, OFTAdapter, DoRAAdapter)


def kind_of(parts: Collection[str]) -> Kind | None:
    """The kind of adapter that has parts of these names in a file; a LoRA with lengths is a DoRA."""
    kind = next((kind for kind in ADAPTERS if not kind.MARKS.isdisjoint(parts)), None)
    return DoRAAdapter if kind is LoRAAdapter and not DoRAAdapter.MARKS.isdisjoint(parts) else kind


def adapter_from_file(layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> Adapter:
    """The adapter that a file's {suffix: tensor} make for a layer; ValueError where none does, or not all are used.

    base: the layer's module, which DoRA needs.
    """
    kind = kind_of(tensors)
    left = sorted(tensors.keys() - (kind.SUFFIXES if kind else set()))
    if kind is None or left:
        raise ValueError(f"{', '.join(left)} cannot be trained here")
    return kind.from_file(layer, tensors, base)
