"""What PEFT and diffusers say of an adapter outside its tensors: alpha, beside the file or in its header."""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.layouts import LAYOUT, RANKED, by_layer

log = logging.getLogger(__name__)

HEADER = "lora_adapter_metadata"  # diffusers' key in a file's metadata
BROKEN = (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, re.error)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
CONFIG = "adapter_config.json"  # PEFT's file beside adapter_model.safetensors


def with_alphas(state: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    """A LoRA file's tensors with an alpha for every layer that PEFT's configuration scales; ValueError if it is broken.

    The configuration is the header's or that of adapter_config.json beside the file; without one, nothing is added.
    """
    layers = by_layer(state)
    try:
        configs = _configs(metadata, path)
        scaled, silent = _scaled(layers, configs)
    except BROKEN as error:
        raise ValueError(f"cannot read the PEFT configuration of {path}: {error}") from error
    for config in configs.values():
        _refuse_changed_base(config, path)
    if silent and metadata.get(LAYOUT) != "diffusers":  # where this program wrote the scale into the weights
        log.warning(
            "%s: %d layers do not say their alpha: taken as their rank, so that the scale is 1", path.name, silent
        )
    return {**state, **scaled}


def _scaled(
    layers: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], int]:
    """What the configurations add or change, and how many layers with a rank nothing says the alpha of."""
    scaled, silent = {}, 0
    for layer, parts in layers.items():
        config = configs.get(layer.partition(".")[0], configs.get(""))
        ranks = [len(parts[part]) for part in RANKED if part in parts and parts[part].ndim]
        if "alpha" in parts:
            continue
        if config is None:
            silent += bool(ranks)
        elif ranks:
            scaled[f"{layer}.alpha"] = torch.tensor(_alpha(config, layer, ranks[0]), dtype=torch.float32)
        elif "lokr_w1" in parts:
            # PEFT scales whole factors too, which every other reader uses as they are.
            rank = config.get("r", 1)
            scaled[f"{layer}.lokr_w1"] = parts["lokr_w1"] * (_alpha(config, layer, rank) / rank)
    return scaled, silent


def _refuse_changed_base(config: Mapping[str, Any], path: Path) -> None:
    """ValueError where PEFT changed the base model's weights when it began, so that the file alone says too little."""
    way = str(config.get("init_lora_weights", "")).lower()
    if way.startswith(CHANGES_BASE):
        raise ValueError(f"{path} must start from the model as it is, got init_lora_weights {way!r}, which changes it")


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """{the first part of layers' names: their configuration}; "" where it holds for all."""
    beside = path.with_name(CONFIG)
    if HEADER in metadata:
        return _unpacked(json.loads(metadata[HEADER]))
    if beside.is_file() and path.name == "adapter_model.safetensors":
        return {"": {**json.loads(beside.read_text(encoding="utf-8"))}}
    return {}


def _unpacked(packed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"unet.lora_alpha": 4, …} -> {"unet": {"lora_alpha": 4, …}}; without a net's name: {"": …}."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in packed.items():
        net, _, field = key.rpartition(".")
        configs.setdefault(net, {})[field] = value
    return configs


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha as everyone else reads it: the update is scaled by alpha / rank."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha", config.get("alpha", rank))
    alpha = next((value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", layer)), alpha)
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
