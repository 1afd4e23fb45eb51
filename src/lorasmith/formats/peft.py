"""What PEFT and diffusers say of an adapter outside its tensors: alpha, beside the file or in its header."""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorasmith.adapters.parts import Parts
from lorasmith.adapters.registry import kind_of
from lorasmith.formats.keys import LAYOUT
from lorasmith.formats.lora_weights import LoRAWeights
from lorasmith.reporting.pace import counted
from lorasmith.storage.not_safetensors import refuse_pointer
from lorasmith.storage.safetensors_header import PEFT_CONFIG

log = logging.getLogger(__name__)

BROKEN = (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, re.error)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
CONFIG = "adapter_config.json"  # PEFT's file beside a LoRA
OWNERS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
"""The names that PEFT and diffusers give the LoRA that it is of; where neither is there, it is of any file beside."""
WRAPPER = "base_model.model."  # what PEFT's files have before a module's name, and its patterns have not


def with_alphas(lora: LoRAWeights) -> LoRAWeights:
    """With an alpha for every layer that PEFT's configuration scales; ValueError if it is broken.

    The configuration is the header's or that of adapter_config.json beside the file; without one, nothing is added.
    """
    try:
        configs = _configs(lora.metadata, lora.path)
        scaled, silent = _scaled(lora.layers, configs)
    except BROKEN as error:
        raise ValueError(f"cannot read the PEFT configuration of {lora.path}: {error}") from error
    for config in configs.values():
        _refuse_changed_base(config, lora.path)
    if silent and lora.metadata.get(LAYOUT) != "diffusers":  # where this program wrote the scale into the weights
        what = f"{counted(silent, 'layer')} without an alpha"
        log.warning("%s: %s: taken to be the rank, so that the scale is 1", lora.path.name, what)
    return lora.changed(scaled)


def _scaled(layers: Mapping[str, Parts], configs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Parts], int]:
    """The layers that the configurations scale, and how many layers with a rank nothing says the alpha of."""
    scaled: dict[str, Parts] = {}
    silent = 0
    for layer, parts in layers.items():
        net, _, module = layer.partition(".")
        config, name = (configs[net], module) if net in configs else (configs.get(""), layer.removeprefix(WRAPPER))
        kind = kind_of(parts)
        if "alpha" in parts or kind is None or not kind.SCALED_BY_RANK:
            continue
        rank = kind.rank_of(parts)
        if config is None:
            silent += rank is not None
        elif rank is not None:
            alpha = torch.tensor(_alpha(config, name, rank), dtype=torch.float32)
            scaled[layer] = {**parts, "alpha": alpha}
        elif (whole := kind.PEFT_SCALES) and whole in parts:
            # PEFT scales whole factors too, which every other reader uses as they are.
            rank = _by_pattern(config, "rank_pattern", name, config.get("r", 1))
            scaled[layer] = {**parts, whole: parts[whole] * (_alpha(config, name, rank) / rank)}
    return scaled, silent


def _refuse_changed_base(config: Mapping[str, Any], path: Path) -> None:
    """ValueError where PEFT changed the base model's weights when it began, so that the file alone says too little."""
    way = str(config.get("init_lora_weights", "")).lower()
    if way.startswith(CHANGES_BASE):
        raise ValueError(f"{path} must start from the model as it is, got init_lora_weights {way!r}, which changes it")


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """{the first part of layers' names: their configuration}; "" where it holds for all."""
    beside = path.with_name(CONFIG)
    if PEFT_CONFIG in metadata:
        return _unpacked(json.loads(metadata[PEFT_CONFIG]))
    is_its = path.name in OWNERS or not any(path.with_name(name).exists() for name in OWNERS)
    if is_its and beside.is_file():
        refuse_pointer(beside)
        return {"": {**json.loads(beside.read_text(encoding="utf-8"))}}
    return {}


def _unpacked(packed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"unet.lora_alpha": 4, …} -> {"unet": {"lora_alpha": 4, …}}; without a net's name: {"": …}."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in packed.items():
        net, _, field = key.rpartition(".")
        configs.setdefault(net, {})[field] = value
    return configs


def _alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha as everyone else reads it: the update is scaled by alpha / rank."""
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", config.get("alpha", rank)))
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _by_pattern(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """What a field says of a module, by the first pattern that its name ends with."""
    patterns: Mapping[str, Any] = config.get(field) or {}
    return next((value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)
