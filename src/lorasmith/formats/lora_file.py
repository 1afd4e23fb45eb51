"""LoRA files: safetensors only; equal content gives equal bytes."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorasmith.formats.folding import in_float32, metadata_of, with_differences, with_whole_layers, without_idle_alphas
from lorasmith.formats.lora_weights import LoRAWeights
from lorasmith.formats.peft import with_alphas
from lorasmith.formats.tucker import without_cores
from lorasmith.reporting.progress import Advance, unwatched
from lorasmith.storage.atomic import write_whole
from lorasmith.storage.hashing import digest
from lorasmith.storage.safetensors_header import Header, header_bytes
from lorasmith.types import Denoiser

log = logging.getLogger(__name__)

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PASSES: tuple[Callable[[LoRAWeights], LoRAWeights], ...] = (
    with_whole_layers, with_alphas, without_cores, with_differences, without_idle_alphas,
)  # fmt: skip
"""Passes that convert what programs write into plain parts, in this order."""
STEPS_KEYS = ("lorasmith.steps", "ss_steps")
NUMBER = r"\d{1,12}"
STEPS_IN_NAME = re.compile(rf"_({NUMBER})_steps")


def file_pieces(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A safetensors file: its header, then each tensor's memory, without a copy if it is on the CPU.

    The library's own writer copies all of them, ends the process if memory runs out, and writes metadata in an order
    that changes between runs. Here it is sorted; tensors come widest first, as the format requires.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    order = sorted(tensors, key=lambda key: (-tensors[key].itemsize, tensors[key].dtype == torch.float16, key))
    entries = [(key, DTYPE_NAMES[tensors[key].dtype], tensors[key].shape, tensors[key].nbytes) for key in order]
    head = header_bytes(entries, metadata)
    return [head, *(tensors[key].reshape(-1).view(torch.uint8).numpy().data for key in order)]


def write(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Saves a LoRA atomically; NaN and infinity are refused (ValueError)."""
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} must be finite to be saved, got NaN or infinity")
    write_whole(Path(path), *file_pieces(state, metadata or {}))


def read(path: str | Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """A file's tensors as plain parts (`PASSES`), and its metadata.

    ValueError if it is invalid.
    """
    lora = completed(*stored(Path(path)))
    return lora.state, lora.metadata


def stored(path: Path) -> tuple[dict[str, Tensor], Header]:
    """A file's tensors as stored, as views of it, and its header; ValueError if it is invalid."""
    header = Header.of(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in header.shapes}, header
    except SafetensorError as error:  # of dtypes that torch has not
        raise ValueError(f"{path} must hold tensors that can be read, but: {error}") from error


def completed(state: Mapping[str, Tensor], header: Header) -> LoRAWeights:
    """A file's tensors as plain parts that every tool knows, multiplied by scales stored separately.

    Unchanged tensors are the same objects. ValueError if a scale or a bias does not fit.
    """
    lora = LoRAWeights.of(in_float32(state, header), metadata_of(header), header.path)
    for simplify in PASSES:
        lora = simplify(lora)
    return lora


def steps_of(path: Path, metadata: Mapping[str, str]) -> int:
    """The steps a LoRA was trained: from its metadata, else its name; 0, with a warning, if neither states them."""
    stated = [steps for key in STEPS_KEYS if (steps := stated_number(metadata, key)) is not None]
    stated += map(int, STEPS_IN_NAME.findall(path.stem))
    if not stated:
        log.warning("existing_lora: %s does not say how many steps it was trained: counting from 0", path.name)
    return stated[0] if stated else 0


def stated_number(metadata: Mapping[str, str], key: str) -> int | None:
    """An integer in the metadata; None if it is missing, no integer, or longer than 12 digits."""
    text = metadata.get(key, "")
    return int(text) if re.fullmatch(NUMBER, text) else None


def stated_settings(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """The adapter settings in the metadata of a lorasmith file; empty if it has none."""
    try:
        return {**json.loads(metadata.get("lorasmith.config", "{}")).get("adapter", {})}
    except (ValueError, TypeError, AttributeError):
        return {}


def base_hash(denoiser: Denoiser, advance: Advance = unwatched) -> str:
    """SHA-256 over names and values (as float32) of the nets' parameters, however the model was loaded."""
    named = (
        (f"{name}.{key}", value)
        for name, net in sorted(denoiser.nets.items())
        for key, value in sorted(net.state_dict().items())
    )
    return digest(named, advance)
