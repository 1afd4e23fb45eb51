"""Weights that are stored as other numbers: those with a scale are read and written, those packed otherwise refused.

A weight is the stored number times its scale, which is one for the tensor or one for each row. The scale is in another
tensor; what else says how the numbers are meant is in small tensors, in the file's metadata or in a config beside it.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.storage.safetensors import TensorFile
from lorasmith.storage.safetensors_header import Header
from lorasmith.storage.scale_names import is_certain, scaled_by

BESIDE = re.compile(r"(^|\.)(scale_input|input_scale|output_scale|comfy_quant|scaled_fp8)$")
"""How inputs are quantised, and flags: they change no weight."""
PACKED = (
    (re.compile(r"(^|\.)(wscales|smooth_factor)$"), "SVDQuant (Nunchaku)"),
    (re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$|\.(nested_)?(absmax|quant_map)$"), "bitsandbytes' 4 bits"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes' int8"),
    (re.compile(r"(^|\.)(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_scale_2$"), "NVFP4"),
    (re.compile(r"\.weight_(packed|zero_point)$"), "compressed-tensors"),
    (re.compile(r"\._weight_(qdata|scale|zero_point)$"), "torchao"),
    (re.compile(r"\.weight\._(data|scale|shift)$"), "quanto"),
)
"""(a name that stands only in files of a kind, the kind)."""
COMFYUI, COMFYUI_KEY, CONFIG_KEY = ".comfy_quant", "_quantization_metadata", "quantization_config"
COMFYUI_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
COMFYUI_OPTIONS = {"format", "full_precision_matrix_mult"}
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
NUM_ROWS = 256  # that are compared at a time
SATURATED = 0.1
"""The share of a change, in squares, that a weight's scale may cut off before it grows."""
FLOATS = ("F64", "F32", "BF16", "F16")
NARROW = ("U8", "I8", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
"""Dtypes whose numbers are no weights without something that says how they are meant."""
PLAIN_FP8 = re.compile(r"((fp|float)8|e[45]m[23](fn)?|[_ -])*", re.IGNORECASE)
SAVED = re.compile(r"(diffusion_pytorch_)?model[\w.-]*\.safetensors")
"""Files that diffusers and transformers write, with a config.json beside them that is of their weights."""


@dataclass(frozen=True)
class StoredWeight:
    """A tensor as a file holds it."""

    numbers: Tensor  # [n_out, …]
    scale: Tensor | None = None  # one, or [n_out]

    @property
    def value(self) -> Tensor:
        """What it stands for; as it is stored where it has no scale."""
        return self.numbers if self.scale is None else dequantised(self.numbers, self.scale)

    def equals(self, other: "StoredWeight") -> bool:
        """Bit for bit, of one that has the same dtypes."""
        has_same_scale = self.scale is None or (other.scale is not None and torch.equal(self.scale, other.scale))
        return has_same_scale and torch.equal(self.numbers, other.numbers)

    def holding(self, value: Tensor) -> "StoredWeight":
        """Another value [n_out, …], rounded, in the same dtypes.

        The scale stays, and what it cannot reach saturates, unless that takes more than SATURATED of the change.
        """
        dtype = self.numbers.dtype
        if self.scale is None:
            return StoredWeight(value.to(dtype))
        numbers, scale = requantised(value, dtype, self.scale)
        if not torch.equal(scale, self.scale):
            same = StoredWeight(rounded(value, dtype, self.scale), self.scale)
            if same.squared_distance(value) <= SATURATED * self.squared_distance(value):
                return same
        return StoredWeight(numbers, scale)

    def squared_distance(self, value: Tensor) -> float:
        """To another value [n_out, …]; some rows at a time, as another copy of a large weight would be held else."""
        if self.scale is not None or not value.ndim:
            return float((value - self.value.float()).norm()) ** 2
        rows = zip(value.split(NUM_ROWS), self.numbers.split(NUM_ROWS), strict=True)
        return sum(float((some - numbers.float()).norm()) ** 2 for some, numbers in rows)


@dataclass(frozen=True)
class Quantisation:
    """How a file's weights are stored."""

    scales: Mapping[str, str]  # {weight: the tensor with its scale}
    beside: frozenset[str]  # tensors that are no weights of the model: scales, flags
    refused: str | None  # what cannot be read; None: every weight can

    @classmethod
    def of(cls, header: Header) -> "Quantisation":
        """ValueError where what says how the numbers are meant cannot be read."""
        weights = {key: weight for key in header.shapes if (weight := _scaled(header, key))}
        scales = {weight: key for key, weight in weights.items()}
        beside = frozenset(key for key in header.shapes if BESIDE.search(key)) | weights.keys()
        twice = (f"two scales of {weight}" for key, weight in weights.items() if scales[weight] != key)
        return cls(scales, beside, next(chain(twice, _refused(header, scales)), None))

    def read(self, file: TensorFile, key: str) -> "StoredWeight":
        return StoredWeight(file.tensor(key), file.tensor(self.scales[key]) if key in self.scales else None)

    def check(self, path: Path) -> None:
        """ValueError where the weights cannot be read."""
        if self.refused:
            raise ValueError(
                f"{path} must hold plain weights, or fp8 or int8 with a scale for each tensor or row, "
                f"got {self.refused}: use the model in bf16, fp16 or fp8"
            )

    def kinds(self, header: Header) -> Iterator[str]:
        """What is to be said of the weights, a line each."""
        dtypes = sorted({header.dtypes[weight].lower() for weight in self.scales})
        if self.scales:
            names = sorted({key.rpartition(".")[2] for key in self.scales.values()})
            yield f"{len(self.scales)} scaled, in {', '.join(dtypes)} with {', '.join(names)}"
        if self.refused:
            yield f"quantised and not readable here: {self.refused}"


def _scaled(header: Header, key: str) -> str | None:
    """The weight that a tensor is the scale of; None where it is no scale."""
    weight = scaled_by(key, header.shapes)
    return weight if weight and (is_certain(key) or header.dtypes[weight] in EIGHT_BITS) else None


def _refused(header: Header, scales: Mapping[str, str]) -> Iterator[str]:
    """What is in the way of reading the weights."""
    yield from _stated(header)
    for key in header.shapes:
        for pattern, kind in PACKED:
            if pattern.search(key):
                yield f"{kind} with {key}"
    yield from _comfyui(header, scales)
    yield from _hinted(header, scales)
    for weight, key in scales.items():
        shape, axes = header.shapes[weight], header.shapes[key]
        num_scales = torch.Size(axes).numel()
        by_row = bool(shape and axes) and num_scales == shape[0] == axes[0]
        if header.dtypes[key] not in FLOATS or not (num_scales == 1 or by_row):
            yield f"scales of blocks: {key} is {header.dtypes[key]} {list(axes)} for a weight {list(shape)}"
    used = set(scales.values())
    for key, shape in header.shapes.items():
        if is_certain(key) and key not in used:
            yield f"the scale {key} without its weight"
        if len(shape) > 1 and header.dtypes[key] in NARROW and key not in scales:
            yield f"{key} in {header.dtypes[key]} without a scale"


def _stated(header: Header) -> Iterator[str]:
    """By a config: in the metadata, or beside a file of diffusers or transformers."""
    found = [(f"the metadata of {header.path.name}", _json(header.metadata.get(CONFIG_KEY)))]
    beside = header.path.parent / "config.json"
    if SAVED.fullmatch(header.path.name) and beside.is_file():
        found.append((str(beside), stated_in(beside)))
    for where, config in found:
        if config:
            method = config.get("quant_method", "an unknown method") if isinstance(config, dict) else config
            yield f"{method} as {CONFIG_KEY} in {where} says"


def _hinted(header: Header, scales: Mapping[str, str]) -> Iterator[str]:
    """Metadata on quantisation that nothing here reads, of a file with numbers that may be no weights."""
    is_narrow = any(header.dtypes[key] in EIGHT_BITS and key not in scales for key in header.shapes)
    for key, value in header.metadata.items() if is_narrow else ():
        is_known = key in (COMFYUI_KEY, CONFIG_KEY) or PLAIN_FP8.fullmatch(value)
        if not is_known and re.search(r"quant|scale", key):
            yield f"the metadata {key} = {value[:60]}"


def stated_in(config: Path) -> Any:
    """The quantisation that a part's config states; None where it states none or cannot be read."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # which whoever loads the part will say
        return None
    return values.get(CONFIG_KEY) if isinstance(values, dict) else None


def _comfyui(header: Header, scales: Mapping[str, str]) -> Iterator[str]:
    """What ComfyUI's notes on layers say, which are in tensors or in the metadata."""
    layers: dict[str, Any] = {}
    stated = _json(header.metadata.get(COMFYUI_KEY))
    if stated is not None:
        found = stated.get("layers") if isinstance(stated, dict) else None
        if not isinstance(found, dict):
            yield f"{COMFYUI_KEY} that cannot be read"
            return
        layers |= found
    notes = [key for key in header.shapes if key.endswith(COMFYUI)]
    if notes:
        with TensorFile(header) as file:
            for key in notes:
                layers[key.removesuffix(COMFYUI)] = _json(file.tensor(key).numpy().tobytes())
    for layer, note in layers.items():
        kind = note.get("format") if isinstance(note, dict) else None
        if kind not in COMFYUI_FORMATS or set(note) - COMFYUI_OPTIONS:
            yield f"ComfyUI's {kind or 'unknown format'} of {layer}: {json.dumps(note)[:80]}"
        weight = f"{layer}.weight"
        own = [key for key in header.shapes if key == weight or key.endswith(f".{weight}")]
        if own and not any(key in scales for key in own):
            yield f"{layer} in ComfyUI's {kind} without its weight_scale"


def _json(text: str | bytes | None) -> Any:
    """None of None; a text that is no JSON as it is."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text if isinstance(text, str) else text.decode("utf-8", "replace")


def weights_only(header: Header) -> Header:
    """A model's header with its scales, and without the tensors that are no weights; ValueError where one is packed."""
    found = Quantisation.of(header)
    found.check(header.path)
    if not found.beside:
        return header
    shapes = {key: shape for key, shape in header.shapes.items() if key not in found.beside}
    return replace(header, shapes=shapes, scales=found.scales)


def dequantised(stored: Tensor, scale: Tensor) -> Tensor:
    """stored [n_out, …] times its scale, one or [n_out]: the weight in float32."""
    return stored.float() * _fitting(scale, stored)


def requantised(weight: Tensor, dtype: torch.dtype, scale: Tensor) -> tuple[Tensor, Tensor]:
    """weight [n_out, …] as numbers in this dtype and their scale, in the old one's shape and dtype.

    A scale stays as it is where no number is rounded by more than half a step, and grows elsewhere: of whole numbers to
    what it must be, of floats by a power of two, so that numbers which the weight had before keep their value.
    """
    largest, half_a_step = _end_of(dtype)
    old = _fitting(scale, weight)
    reach = weight.abs().amax(dim=tuple(range(1 if old.numel() > 1 else 0, weight.ndim)), keepdim=True).view_as(old)
    growth = reach / (old.abs() * (largest + half_a_step))
    doubled = old * torch.exp2(growth.log2().ceil())
    grown = torch.where(growth.isfinite(), doubled, reach / largest) if dtype != torch.int8 else reach / largest
    new = torch.where(growth > 1, grown, old).to(scale.dtype).view_as(scale)
    return rounded(weight, dtype, new), new


def rounded(weight: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """weight [n_out, …] divided by its scale, as numbers in this dtype; what is out of reach saturates."""
    largest, _ = _end_of(dtype)
    divisor = _fitting(scale, weight)
    numbers = (weight / torch.where(divisor == 0, 1, divisor)).clamp(-largest, largest)
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype)


def _end_of(dtype: torch.dtype) -> tuple[float, float]:
    """The largest number, and half the step to the one before it."""
    if dtype == torch.int8:
        return float(torch.iinfo(dtype).max), 0.5
    largest = torch.finfo(dtype).max
    return largest, torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) / 2


def _fitting(scale: Tensor, weight: Tensor) -> Tensor:
    """float32, in a shape that multiplies a weight's rows."""
    return scale.float().reshape(-1, *[1] * (weight.ndim - 1)) if scale.numel() > 1 else scale.float().reshape(())
