"""What other programs write beside plain factors, taken into them: scales of 8-bit tensors, biases, XLabs' q, k and v.

r rank, n a layer's outputs.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.adapters.parts import OFFSETS, SCALE, VECTOR, alpha_of, fitting
from lorasmith.formats.keys import DOWN, DOWN_BIAS, UP, UP_BIAS
from lorasmith.formats.lora_weights import LoRAWeights
from lorasmith.reporting.pace import counted
from lorasmith.storage.safetensors_header import Header
from lorasmith.storage.scale_names import VAGUE_SCALE, scaled_by

log = logging.getLogger(__name__)

FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
MARK = "scaled_fp8"  # an empty tensor, by which files of 8-bit floats are known
DIFFERENCE = "diff_b"
SINGLE_QKV = re.compile(r"(.*single_blocks\.\d+\.)processor\.qkv_lora\.up\.weight")
MLP = 4  # the outputs of the MLP in a single block of Flux.1, times its inputs, beside those of q, k and v


def in_float32(state: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
    """8-bit floats as float32, times their scales; ValueError where a scale does not fit, or is of another kind."""
    scales = _scales(state, header)
    found = {key: tensor for key, tensor in state.items() if key not in scales and key != MARK}
    for name, (key, scale) in scales.items():
        if not scale.is_floating_point() or not scale.float().isfinite().all():
            raise ValueError(f"{header.path}: {name} must hold finite floating-point numbers, got {scale.tolist()}")
        if not found[key].is_floating_point():
            raise ValueError(
                f"{header.path}: {key} must hold floating-point numbers, got {found[key].dtype} with {name}"
            )
        rows = [len(found[key]), *[1] * (found[key].ndim - 1)] if found[key].ndim else []
        if scale.numel() != 1 and list(scale.shape) not in (rows, rows[:1]):
            raise ValueError(f"{header.path}: {name} must be one number or {rows}, got {list(scale.shape)}")
        found[key] = found[key].float() * scale.float().view(rows if scale.numel() != 1 else [])
    return {key: tensor.float() if tensor.dtype in FLOATS_8 else tensor for key, tensor in found.items()}


def _scales(state: Mapping[str, Tensor], header: Header) -> dict[str, tuple[str, Tensor]]:
    """{name of a scale, a tensor or in the metadata: (key of what it scales, scale)}; ValueError where it is vague."""
    found = {name: (key, scale) for name, scale in state.items() if (key := scaled_by(name, state))}
    has_floats_8 = any(tensor.dtype in FLOATS_8 for tensor in state.values())
    for name, text in header.metadata.items():
        key = scaled_by(name, state)
        if key is None and not (has_floats_8 and VAGUE_SCALE.fullmatch(name)):
            continue
        try:
            scale = torch.tensor(float(text), dtype=torch.float32)
        except ValueError:
            scale = None
        if key is None or scale is None:
            raise ValueError(
                f"{header.path} must state scales in its metadata as a number for each tensor, got {name} = {text:.40}"
            )
        found[name] = (key, scale)
    return found


def metadata_of(header: Header) -> dict[str, str]:
    """A file's metadata but for the scales in it, which tensors are read with."""
    return {name: text for name, text in header.metadata.items() if scaled_by(name, header.shapes) is None}


def with_whole_layers(lora: LoRAWeights) -> LoRAWeights:
    """XLabs' q, k and v of Flux.1's single blocks as adapters of linear1, whose rows of the MLP stay as they are.

    [3n, r] -> [3n + 4n, r].
    """
    found, keys = {}, dict(lora.keys)
    for (layer, part), key in lora.keys.items():
        up = lora.layers[layer][part]
        if SINGLE_QKV.fullmatch(key) and up.ndim == 2:
            rest = up.new_zeros(len(up) // 3 * MLP, up.shape[1])
            found[layer] = {**lora.layers[layer], part: torch.cat([up, rest])}
            del keys[layer, part]
    return replace(lora.changed(found), keys=keys)


def with_differences(lora: LoRAWeights) -> LoRAWeights:
    """The biases of a LoRA's factors, which are scaled as they are, as a difference of the layer's bias.

    s (B (A x + a) + b) = s B A x + s (B a + b). Those beside dora_scale stay. ValueError where they do not fit.
    """
    found = {}
    for layer, parts in lora.layers.items():
        biases = parts.keys() & {DOWN_BIAS, UP_BIAS}
        if not biases or not parts.keys().isdisjoint({SCALE, VECTOR}):
            continue
        own = {part: tensor for part, tensor in parts.items() if part not in biases}
        try:
            difference = _difference(parts)
            if difference.any():
                size = tuple(difference.shape)
                own[DIFFERENCE] = difference + fitting(parts, DIFFERENCE, size) if DIFFERENCE in parts else difference
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
        found[layer] = own
    return lora.changed(found)


def _difference(parts: Mapping[str, Tensor]) -> Tensor:
    """What the biases of the factors add to the layer's [n], float32."""
    rank = len(parts[DOWN]) if DOWN in parts and parts[DOWN].ndim else 0
    num_out = len(parts[UP]) if UP in parts and parts[UP].ndim else 0
    up = (
        fitting(parts, UP, (num_out, rank, *parts[UP].shape[2:])).float().flatten(1)
        if num_out
        else torch.zeros(0, rank)
    )
    sums = torch.zeros(num_out, dtype=torch.float32)
    if UP_BIAS in parts:
        sums += fitting(parts, UP_BIAS, (num_out,)).float()
    if DOWN_BIAS in parts:
        sums += up @ fitting(parts, DOWN_BIAS, (rank,)).float()
    return sums * (alpha_of(parts, rank) / rank)


def without_idle_alphas(lora: LoRAWeights) -> LoRAWeights:
    """Without the alphas of layers that have no factors to be scaled, which are counted in a warning."""
    idle = {layer for layer, parts in lora.layers.items() if parts.keys() - OFFSETS.keys() == {"alpha"}}
    if idle:
        log.warning(
            "%s: %s without factors %s an alpha, which is ignored, such as %s", lora.path.name,
            counted(len(idle), "layer"), "has" if len(idle) == 1 else "have", min(idle),
        )  # fmt: skip
    kept = {layer: {p: t for p, t in lora.layers[layer].items() if p != "alpha"} for layer in idle}
    layers = {layer: kept.get(layer, parts) for layer, parts in lora.layers.items()}
    return replace(lora, layers={layer: parts for layer, parts in layers.items() if parts})
