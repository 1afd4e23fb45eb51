"""The names of keys in LoRA files, as the program that a file is for reads them."""

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.utils
from torch import Tensor

from lorasmith.adapters.parts import SCALE
from lorasmith.adapters.registry import kind_of
from lorasmith.formats.keys import DOWN, UP, by_layer

LAYOUTS = ("ComfyUI", "kohya", "diffusers")
PREFIX = "diffusion_model."


def in_layout(lora: Mapping[str, Tensor], layout: str, model: Any) -> dict[str, Tensor]:
    """A LORA_MODEL with the keys of this layout; ValueError where it has none for a layer, or for the algorithm."""
    if layout == "ComfyUI":
        return dict(lora)
    if model is None:
        raise ValueError(f"model must be connected for the layout {layout}: it knows the layers' other names")
    layers = by_layer(lora)
    state: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        if not layer.startswith(PREFIX):
            raise ValueError(f"lora must be named as ComfyUI names it to be saved in another layout, got {layer}")
        state |= _kohya(layer, parts, model) if layout == "kohya" else _diffusers(layer, parts, model)
    return state


def _kohya(layer: str, parts: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """As sd-scripts names it: by diffusers' names for SD 1 and 2, by the original ones for all others."""
    name = layer.removeprefix(PREFIX)
    if _is_early(model):
        ((name, _),) = _other_names(layer, model)
    return {f"lora_unet_{name}.{part}".replace(".", "_", name.count(".")): tensor for part, tensor in parts.items()}


def _diffusers(layer: str, parts: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """As diffusers names it; a layer that diffusers has in parts gets a part of the rows each."""
    if not {DOWN, UP} <= parts.keys() <= {DOWN, UP, "alpha", SCALE}:
        raise ValueError(f"the layout diffusers is for LoRA and DoRA, got {', '.join(sorted(parts))} for {layer}")
    kind = kind_of(parts)
    assert kind is not None
    root = "unet" if "model_channels" in model.model_config.unet_config else "transformer"
    state = {}
    for name, rows in _other_names(layer, model):
        own = {part: t if rows is None or part not in kind.BY_OUTPUT else t[rows] for part, t in parts.items()}
        state |= {f"{root}.{name}.{part}": tensor for part, tensor in (kind.to_peft(own) or {}).items()}
    return state


def _other_names(layer: str, model: Any) -> list[tuple[str, slice | None]]:
    """diffusers' names of a layer, each with the rows that it has; ValueError where there are none."""
    found = []
    for name, target in _diffusers_names(model).items():
        key, *rest = (target,) if isinstance(target, str) else target
        if key == f"{layer}.weight" and name.endswith(".weight") and len(rest) <= 1:
            axis, start, size = rest[0] if rest else (0, 0, None)
            if axis == 0:
                rows = None if size is None else slice(start, start + size)
                found.append((name.removesuffix(".weight"), rows))
    if not found:
        raise ValueError(f"the layout has no name for {layer}")
    whole = [name for name, rows in found if rows is None]
    if len(whole) > 1:  # a vector of the model's own has the names of two parts, of which SDXL has the second
        is_added = model.model_config.unet_config.get("num_classes") == "sequential"
        return [(next(name for name in whole if name.startswith("add_embedding") == is_added), None)]
    return found


def _diffusers_names(model: Any) -> dict[str, Any]:
    """{diffusers' name of a weight: ComfyUI's, or a tuple of that and the rows}."""
    config, kind = model.model_config.unet_config, type(model).__name__
    if "model_channels" in config:
        return {name: f"{PREFIX}{key}" for name, key in comfy.utils.unet_to_diffusers(config).items()}
    tables = {"Flux": comfy.utils.flux_to_diffusers, "SD3": comfy.utils.mmdit_to_diffusers}
    if kind not in tables:
        raise ValueError(f"the layout is known for UNets, {' and '.join(tables)}, got {kind}")
    return tables[kind](config, output_prefix=PREFIX)


def _is_early(model: Any) -> bool:
    """SD 1 or 2: a UNet without a vector of its own."""
    config = model.model_config.unet_config
    return "model_channels" in config and config.get("adm_in_channels") is None
