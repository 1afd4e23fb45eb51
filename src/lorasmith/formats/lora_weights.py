"""A LoRA as the program reads it: made once, then handed from pass to pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lorasmith.adapters.parts import Parts
from lorasmith.formats.keys import by_layer, split


@dataclass(frozen=True)
class LoRAWeights:
    """The parts of each layer, what its file says of them, and what of it fits no layer of the model."""

    layers: Mapping[str, Parts]  # {layer as the file calls it: {part: tensor}}
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path("lora.safetensors")  # what messages call it
    keys: Mapping[tuple[str, str], str] = field(default_factory=dict)  # {(layer, part): the file's own key}
    misfits: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, path: Path = path
    ) -> "LoRAWeights":
        """Of a file's tensors; ValueError where two keys mean the same."""
        return cls(by_layer(state), metadata or {}, path, {split(key): key for key in state})

    @property
    def state(self) -> dict[str, Tensor]:
        """{the file's own key, or layer.part where it has none: tensor}."""
        parts = ((layer, part, tensor) for layer, parts in self.layers.items() for part, tensor in parts.items())
        return {self.keys.get((layer, part), f"{layer}.{part}"): tensor for layer, part, tensor in parts}

    def changed(self, layers: Mapping[str, Parts]) -> "LoRAWeights":
        """With these layers in the place of those of the same names."""
        return replace(self, layers={**self.layers, **layers})
