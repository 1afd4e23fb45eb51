"""LoRAs on ComfyUI's models: every key is used, or none."""

from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
from torch import Tensor

from lorasmith.adapters.registry import ADAPTERS, kind_of
from lorasmith.formats.keys import by_layer


class Read(dict[str, Tensor]):
    """A LoRA that notes which of its keys are read."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(state)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            self.keys_read.add(key)
        return super().get(key, default)


def with_lora(model: Any, lora: dict[str, Tensor], strength: float, *, beside: bool = False) -> Any:
    """A clone of a MODEL with the LoRA in its weights, or beside them; ValueError that names keys which do not fit."""
    left = keys_left(model, lora)
    if left:
        shown = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        raise ValueError(f"lora must fit the model, but {len(left)} of its {len(lora)} keys do not: {shown}")
    if beside:
        _refuse_beside(lora)
    if strength == 0:
        return model
    load = vars(comfy.sd).get("load_bypass_lora_for_models") if beside else comfy.sd.load_lora_for_models
    if load is None:
        raise ValueError("bypass must be off: this version of ComfyUI cannot compute a LoRA beside the weights")
    return load(model, None, lora, strength, 0)[0]


def _refuse_beside(lora: dict[str, Tensor]) -> None:
    """ValueError for algorithms that ComfyUI fails on, or gets wrong, when it computes them beside the weights."""
    kinds = {kind_of(parts) for parts in by_layer(lora).values()}
    for kind in ADAPTERS:
        if kind in kinds and not kind.COMFYUI_BYPASS:
            raise ValueError(f"bypass must be off for {kind.algorithm}, which ComfyUI cannot compute beside all layers")


def keys_left(model: Any, lora: dict[str, Tensor]) -> list[str]:
    """The keys that ComfyUI's own loader does not read for this model."""
    read = Read(comfy.lora_convert.convert_lora(dict(lora)))
    comfy.lora.load_lora(read, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    return sorted(read.keys() - read.keys_read)
