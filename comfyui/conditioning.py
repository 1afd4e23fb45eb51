"""Latents and conditioning as ComfyUI hands them over -> samples, and what the model reads for each.

N samples, C channels, h w latent sides.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from lorasmith.data.encode import checked
from lorasmith.training.in_memory import paired
from lorasmith.types import Cached

Pair = Sequence[Any]
"""ComfyUI's [tensor [1,L,D], dict]."""


def prepared(
    model: Any, latents: Sequence[Any], positive: Sequence[Any], *, are_buckets: bool
) -> tuple[list[Cached], list[dict[str, Any]]]:
    """Samples in the model's own scale, and for each what the model's extra_conds make of its conditioning.

    are_buckets: each of `positive` belongs to one of `latents`; else all are in one row. ValueError on a mismatch.
    """
    samples, entries = [], []
    for number, (latent, pair) in enumerate(in_pairs(latents, positive, are_buckets=are_buckets)):
        if len(latent) != model.latent_format.latent_channels:
            raise ValueError(
                f"latents must have the model's {model.latent_format.latent_channels} channels, got {len(latent)}"
            )
        x0 = model.process_latent_in(latent[None])[0]  # some formats have numbers for each channel of a batch
        entry = _entry(model, pair, x0)
        where = torch.tensor([float(number)])
        samples.append(checked(Cached(str(number), x0, {"entry": where, "digest": _digest(entry)})))
        entries.append(entry)
    return samples, entries


def in_pairs(latents: Sequence[Any], positive: Sequence[Any], *, are_buckets: bool) -> list[tuple[Tensor, Pair]]:
    """Each latent [C,h,w] with its own conditioning, from lists of LATENT and CONDITIONING; ValueError on a mismatch.

    are_buckets: as many of both belong to each other one by one, a batch to its list; else all are in one row.
    """
    in_one_row = len(latents) != len(positive) or not are_buckets
    conds = [pair for part in positive for pair in part] if in_one_row else list(positive)
    return paired(list(latents), conds, _pairs, several_sizes=True)


def is_pair(entry: Any) -> bool:
    """Whether this is ComfyUI's [tensor, dict]."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], Mapping)


def _pairs(entries: Sequence[Any], name: str) -> list[Pair]:
    """ValueError where one is not a pair of ComfyUI's."""
    for index, entry in enumerate(entries):
        if not is_pair(entry):
            raise ValueError(f"{name}[{index}] must be [tensor, dict], got {type(entry).__name__}")
        if "hooks" in entry[1]:
            raise ValueError(f"{name}[{index}] must have no hooks, which change the model's weights on the way")
        if entry[1].get("start_percent", 0.0) > 0 or entry[1].get("end_percent", 1.0) < 1:
            raise ValueError(f"{name}[{index}] must be for all times, got a range: every time is trained on")
        if not all(x.isfinite().all() for x in (entry[0], entry[1].get("pooled_output")) if isinstance(x, Tensor)):
            raise ValueError(f"{name}[{index}] must be finite, got NaN or infinity")
    return list(entries)


def _entry(model: Any, pair: Pair, x0: Tensor) -> dict[str, Any]:
    """The conditioning of a sample x0 [C,h,w] as `calc_cond_batch` takes it; its tensors wait on the CPU."""
    device = next(model.diffusion_model.parameters()).device
    (plain,) = comfy.sampler_helpers.convert_cond([_mapped(list(pair), torch.clone)])  # no tensors of inference mode
    noise = torch.zeros_like(x0)[None].to(device)
    with torch.no_grad():
        found = comfy.samplers.process_conds(model, noise, {"positive": [plain]}, device, x0[None].to(device))
    (entry,) = found["positive"]
    for cond in entry["model_conds"].values():
        cond.cond = _mapped(cond.cond, Tensor.cpu)
    return entry


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors changed, also in dicts and lists."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_mapped(inner, change) for inner in value])
    return value


def _digest(entry: Mapping[str, Any]) -> Tensor:
    """SHA-256 of what the model reads, as 32 numbers: it makes the conditioning part of what a checkpoint knows."""
    found = hashlib.sha256()
    for part in _parts(entry, ""):
        found.update(part)
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8).float()


def _parts(value: Any, name: str) -> Iterator[bytes]:
    """Names and values of tensors, numbers and texts in it."""
    if isinstance(value, Tensor):
        yield f"{name} {tuple(value.shape)}".encode()
        yield value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    elif isinstance(value, int | float | str):
        yield f"{name} {value!r}".encode()
    elif isinstance(value, Mapping):
        for key in sorted(key for key in value if key != "uuid"):
            yield from _parts(value[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _parts(inner, f"{name}.{index}")
    elif isinstance(value, comfy.conds.CONDRegular):
        yield from _parts(value.cond, name)
