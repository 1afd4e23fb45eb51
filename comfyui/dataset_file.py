"""Encoded samples as safetensors: tensors by number, and how they make up each conditioning as JSON beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lorasmith.storage.atomic import make_folder, write_whole

KEY = "lorasmith.dataset"
TENSOR = "tensor"
Sample = tuple[Tensor, Sequence[Any]]
"""A latent [C,h,w] and its [tensor, dict]."""


def write(path: Path, samples: Sequence[Sample]) -> None:
    """All of it or, where that fails (OSError, ValueError), nothing."""
    tensors: dict[str, Tensor] = {}
    entries = [
        {"latent": _put(latent, tensors, "latent"), "positive": _put(list(pair), tensors, "positive")}
        for latent, pair in samples
    ]
    content = save(tensors, {KEY: json.dumps(entries)})
    make_folder(path.parent)
    write_whole(path, content)


def read(path: Path) -> list[Sample]:
    """ValueError where the file is none of ours, or not sound."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise ValueError(f"{path.name} must be a data set that this pack has written, but it does not say so")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} must be a sound safetensors file, but it cannot be read: {error}") from error
    try:
        entries = json.loads(metadata[KEY])
        return [(_got(entry["latent"], tensors), _got(entry["positive"], tensors)) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path.name} must say how its tensors make up samples, but: {error!r}") from error


def _put(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """A value as JSON, its tensors taken out; ValueError where it holds something that no file can."""
    if isinstance(value, Tensor):
        key = f"{len(tensors):06d}"
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {TENSOR: key}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_put(inner, tensors, f"{where}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, Mapping):
        return {"dict": {key: _put(inner, tensors, f"{where}.{key}") for key, inner in value.items()}}
    raise ValueError(f"{where} must be made of tensors, numbers and texts to be saved, got {type(value).__name__}")


def _got(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_got(inner, tensors) for inner in value]
    if isinstance(value, dict):
        if TENSOR in value:
            return torch.clone(tensors[value[TENSOR]])
        return {key: _got(inner, tensors) for key, inner in value["dict"].items()}
    return value
