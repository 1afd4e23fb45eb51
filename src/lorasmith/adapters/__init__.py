"""The algorithms, one a file, and what they share."""

from collections.abc import Collection, Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from lorasmith.adapters.layer import Adapter, Layer
from lorasmith.adapters.loha import LoHa, LoHaAdapter
from lorasmith.adapters.lokr import LoKr, LoKrAdapter
from lorasmith.adapters.lora import LoRA, LoRAAdapter
from lorasmith.adapters.oft import OFT, OFTAdapter
from lorasmith.component import named

Algorithm = Annotated[
    LoRA | LoHa | LoKr | OFT, Field(discriminator="name", description="the kind of adapter"), named("LoRA")
]
ADAPTERS = (LoRAAdapter, LoHaAdapter, LoKrAdapter, OFTAdapter)


def kind_of(parts: Collection[str]) -> type[LoRAAdapter | LoHaAdapter | LoKrAdapter | OFTAdapter] | None:
    """The kind of adapter that has parts of these names in a file."""
    return next((kind for kind in ADAPTERS if not kind.MARKS.isdisjoint(parts)), None)


def adapter_from_file(layer: Layer, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter that a file's {suffix: tensor} make for a layer; ValueError where none does, or not all are used."""
    kind = kind_of(tensors)
    left = sorted(tensors.keys() - (kind.SUFFIXES if kind else set()))
    if kind is None or left:
        raise ValueError(f"{', '.join(left)} cannot be trained here")
    return kind.from_file(layer, tensors)
