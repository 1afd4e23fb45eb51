"""Latents and conditioning that callers hand over -> samples.

N samples, C channels, h w latent sides, L tokens, D width; a bucket is a batch of latents of one size.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith.data.encode import checked
from lorasmith.devices import device_of
from lorasmith.models.load import Family
from lorasmith.types import Cached, Cond

log = logging.getLogger(__name__)
T = TypeVar("T")
VECTORS = {"pooled": "D", "mask": "L"}
"""Conditioning with one axis: what that counts."""
ENCODE = "make latents with encode_images of lorasmith.load_model(model).codec(device)"
Convert = Callable[[Sequence[Any], str], list[T]]
"""Entries of `positive` and their name, for messages -> what they stand for."""


def samples_of(latents: Any, positive: Any, family: Family | None, *, several_sizes: bool) -> list[Cached]:
    """latents and positive as `train_lora` takes them -> samples in their order; ValueError on a mismatch."""
    if not isinstance(several_sizes, bool):
        raise ValueError(f"bucket_mode must be true or false, got {several_sizes!r}")
    pairs = paired(latents, positive, partial(_conds, family=family), several_sizes=several_sizes)
    return [checked(Cached(str(i), *pair)) for i, pair in enumerate(pairs)]


def paired(latents: Any, positive: Any, convert: Convert[T], *, several_sizes: bool) -> list[tuple[Tensor, T]]:
    """Each latent [C,h,w] or [C,f,h,w], float32, on the CPU, with its own conditioning; ValueError on a mismatch."""
    buckets = _buckets(latents, several_sizes)
    conds = _conds_of_all(positive, [len(bucket) for bucket in buckets], convert)
    return list(zip((x0 for bucket in buckets for x0 in bucket), conds, strict=True))


def _buckets(latents: Any, several_sizes: bool) -> list[Tensor]:
    """Each bucket [N,C,h,w] or [N,C,f,h,w], float32, on the CPU; ValueError where it is something else."""
    listed = isinstance(latents, list | tuple)
    buckets = [_bucket(entry, f"latents[{i}]" if listed else "latents") for i, entry in enumerate(_listed(latents))]
    sizes = [list(bucket.shape[1:]) for bucket in buckets]
    if len({(len(size), size[0]) for size in sizes}) > 1:
        raise ValueError(f"latents must have the same channels and axes, got {_several(sizes)}")
    if not several_sizes and any(size != sizes[0] for size in sizes):
        raise ValueError(f"latents must be of one size unless bucket_mode is True, got {_several(sizes)}")
    return buckets


def _listed(latents: Any) -> Sequence[Any]:
    if isinstance(latents, list | tuple) and not latents:
        raise ValueError("latents must be a tensor, {'samples': tensor} or a list of these, got an empty list")
    return latents if isinstance(latents, list | tuple) else [latents]


def _tensor(value: Any) -> Any:
    """NumPy's arrays of numbers as tensors."""
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value


def _several(sizes: list[list[int]]) -> str:
    return " and ".join(map(str, dict.fromkeys(map(tuple, sizes))))


def _bucket(latents: Any, name: str) -> Tensor:
    tensor = _tensor(latents.get("samples") if isinstance(latents, Mapping) else latents)
    if isinstance(tensor, Image.Image):
        raise ValueError(f"{name} must be encoded, got a picture: {ENCODE}")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor or {{'samples': tensor}}, got {type(latents).__name__}")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"{name} must be a plain tensor that holds numbers, got {tensor.layout} on {tensor.device}")
    if tensor.ndim not in (4, 5) or 0 in tensor.shape:
        raise ValueError(f"{name} must be [N,C,h,w] or [N,C,f,h,w], none of them 0, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        way = f"; for pictures, {ENCODE}" if tensor.dtype == torch.uint8 else ""
        raise ValueError(f"{name} must hold floating point numbers, got {tensor.dtype}{way}")
    if isinstance(latents, Mapping) and latents.get("noise_mask") is not None:
        log.warning("%s: noise_mask is not used: the whole latent is trained on", name)
    return tensor.detach().clone().to("cpu", torch.float32)


def _conds_of_all(positive: Any, counts: list[int], convert: Convert[T]) -> list[T]:
    """One conditioning for each of all samples; `positive` is flat, or has a list for each bucket."""
    if isinstance(positive, str | bytes | Mapping | Tensor) or not isinstance(positive, Sequence) or not positive:
        raise ValueError(f"positive must be a list with a conditioning for each latent, got {_described(positive)}")
    nested = [isinstance(entry, list | tuple) and not _is_pair(entry) for entry in positive]
    if not any(nested):
        return _one_each(positive, sum(counts), convert, "positive")
    if not all(nested):
        index = nested.index(False)
        raise ValueError(f"positive must have lists alone or none, got {_described(positive[index])} at {index}")
    if len(counts) == 1:
        return _one_each([entry for part in positive for entry in part], counts[0], convert, "positive")
    if len(positive) != len(counts):
        raise ValueError(
            f"positive must have a list for each of the latents, got {len(positive)} lists for {len(counts)} latents"
        )
    parts = [
        _one_each(part, count, convert, f"positive[{index}]")
        for index, (part, count) in enumerate(zip(positive, counts, strict=True))
    ]
    return [cond for part in parts for cond in part]


def _is_pair(entry: Sequence[Any]) -> bool:
    """Whether this is ComfyUI's [tensor, dict]."""
    return len(entry) == 2 and isinstance(entry[1], Mapping) and isinstance(entry[0], Tensor)


def _conds(entries: Sequence[Any], name: str, family: Family | None) -> list[Cond]:
    """Each conditioning of the list of this name as {name: [L,D] or [D]}, float32, on the CPU."""
    if entries and all(isinstance(entry, str) for entry in entries):
        return _encoded(entries, family)
    return [_cond(entry, f"{name}[{index}]") for index, entry in enumerate(entries)]


def _encoded(captions: Sequence[str], family: Family | None) -> list[Cond]:
    if family is None:
        raise ValueError("positive must be tensors where model is a Denoiser, which cannot encode captions, got texts")
    codec = family.codec(device_of(family.denoiser))
    with torch.no_grad():
        batches = [codec.encode_texts([caption]) for caption in captions]
    return [{name: value[0].cpu() for name, value in batch.items()} for batch in batches]


def _cond(entry: Any, where: str) -> Cond:
    """One entry of `positive`; of ComfyUI's dict, the pooled output goes along."""
    entry = _tensor(entry)
    if isinstance(entry, list | tuple) and _is_pair(entry):
        text, extra = entry
        pooled = extra.get("pooled_output")
        entry = {"text": text} if pooled is None else {"text": text, "pooled": pooled}
    if isinstance(entry, Tensor):
        entry = {"text": entry}
    if isinstance(entry, Mapping):
        entry = {name: _tensor(value) for name, value in entry.items()}
    if not isinstance(entry, Mapping) or not all(isinstance(value, Tensor) for value in entry.values()):
        raise ValueError(
            f"{where} must be a tensor, a dict of tensors, a caption or [tensor, dict], got {_described(entry)}"
        )
    return {name: _one(name, value, where) for name, value in entry.items()}


def _one(name: str, value: Tensor, where: str) -> Tensor:
    """A tensor with or without a batch axis of 1 -> [L,D], or [D] or [L] for vectors."""
    axes = 1 if name in VECTORS else 2
    if value.ndim == axes + 1 and len(value) == 1:
        value = value[0]
    if value.ndim != axes:
        letters = VECTORS.get(name, "L,D")
        rule = f"[{letters}] or [1,{letters}]"
        raise ValueError(f"{where} {name} must be {rule}, got {list(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{where} {name} must hold floating point numbers, got {value.dtype}")
    return value.detach().clone().to("cpu", torch.float32)


def _described(value: Any) -> str:
    return f"{type(value).__name__} of length {len(value)}" if isinstance(value, list | tuple) else type(value).__name__


def _one_each(entries: Sequence[Any], num_latents: int, convert: Convert[T], name: str) -> list[T]:
    conds = convert(entries, name)
    if len(conds) == 1:
        return conds * num_latents
    if len(conds) != num_latents:
        raise ValueError(
            f"{name} must have one conditioning for each latent or one for all, "
            f"got {len(conds)} conditionings for {num_latents} latents"
        )
    return conds
