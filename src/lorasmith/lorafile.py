"""LoRA files: safetensors, kohya's layout; equal content makes equal bytes. No other format is read or written."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lorasmith.adapters.layer import Layer
from lorasmith.adapters.lora import LoRAAdapter
from lorasmith.attach import AdapterSet, adaptable_layers
from lorasmith.types import Denoiser

PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def file_bytes(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; ValueError that names a tensor with NaN or infinity.

    The library writes metadata in an order that changes between runs, so the header's is set here, sorted.
    """
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} must be finite to be saved, got NaN or infinity")
    plain = save({key: tensor.contiguous() for key, tensor in sorted(state.items())})
    (length,) = struct.unpack("<Q", plain[:8])
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(plain[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + plain[8 + length :]


def write(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Saves a LoRA: all of it or, where that fails (OSError, ValueError), nothing."""
    content = file_bytes(state, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and metadata; ValueError where it is no sound safetensors file."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"{path} must be a safetensors file: a pickle ({path.suffix}) can run code when it is loaded")
    if not path.is_file():
        raise ValueError(f"{path} must be a safetensors file, got {'a folder' if path.is_dir() else 'nothing there'}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, but it cannot be read: {error}") from error


def adapters_from(state: Mapping[str, Tensor], denoiser: Denoiser) -> AdapterSet:
    """The adapters that a file holds for this denoiser; ValueError unless every key is used."""
    paths = {denoiser.file_key(path): path for path in adaptable_layers(denoiser.nets)}
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer_key, _, suffix = key.partition(".")
        by_layer.setdefault(layer_key, {})[suffix] = tensor
    suffixes = set(LoRAAdapter.SUFFIXES)
    strange = [k for k, t in by_layer.items() if k not in paths or not suffixes - {"alpha"} <= set(t) <= suffixes]
    if strange or not by_layer:
        raise ValueError(
            f"the LoRA does not fit the model: {len(strange)} of its {len(by_layer)} layers are not there or not plain "
            f"LoRA, such as {', '.join(strange[:3]) or 'none at all'}"
        )
    layers = adaptable_layers(denoiser.nets)
    adapters = {}
    for key, tensors in by_layer.items():
        try:
            adapters[paths[key]] = LoRAAdapter.from_file(Layer.of(paths[key], layers[paths[key]]), tensors)
        except ValueError as error:
            raise ValueError(f"the LoRA does not fit the model: {key}: {error}") from error
    return AdapterSet(adapters)


def base_hash(denoiser: Denoiser) -> str:
    """SHA-256 over names and values (as float32) of the nets' parameters: equal however the model was handed over."""
    digest = hashlib.sha256()
    for name, net in sorted(denoiser.nets.items()):
        for key, value in sorted(net.state_dict().items()):
            digest.update(f"{name}.{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
