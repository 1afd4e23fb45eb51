"""A LoRA under the names of another program, for the model that it belongs to, of which no weights are loaded."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import torch

from lorasmith.adapters.base import NoWeights
from lorasmith.adapters.dora import SCALE, VECTOR
from lorasmith.attach import AdapterSet
from lorasmith.config import LayoutName
from lorasmith.dora_scales import KEY
from lorasmith.experts import named_part
from lorasmith.families.published import PUBLISHED
from lorasmith.families.skeletons import published_skeleton, skeleton
from lorasmith.file_layouts import in_layout, metadata_of, refuse_several
from lorasmith.files.factors import LoRAFile
from lorasmith.files.outputs import derived, refuse_output
from lorasmith.files.stored import with_stored_weights
from lorasmith.layouts import LAYOUT, known_originals, normal
from lorasmith.loading import adapters_from
from lorasmith.tensor_file import Named, write_streamed
from lorasmith.types import Denoiser

LENGTHS = ("alpha", SCALE, VECTOR)
"""What is kept in float32 in a file of 16 bits."""
NUM_BATCHES = 16
TEXT = re.compile(r"(^|_)te\d?_|text_encoder|text_model")


def convert(
    source: Path, output: Path, model: str | Path | None, layout: LayoutName, *, overwrite: bool = False
) -> int:
    """Writes the LoRA in a layout, in the widest dtype of its weights; returns how many layers it holds.

    model: None: the published one that it fits. ValueError where it fits none, or the layout has no way to say it.
    """
    refuse_output(output, overwrite=overwrite)
    lora = LoRAFile.opened(source)
    lora.refuse_strange_parts()
    before = {key: value for key, value in lora.metadata.items() if key not in (KEY, LAYOUT)}
    metadata = derived(before, f"convert to {layout}'s names")
    try:
        converted = _for_published(lora, layout) if model is None else _for_model(lora, model, layout)
        own = metadata_of(converted.adapters, converted.denoiser, layout)
        write_streamed(output, converted.tensors(), lambda: {**metadata, **own})
    except NoWeights as error:
        raise ValueError(
            f"{source} holds DoRA, whose lengths depend on the model's weights in {layout}'s layout or in its own: "
            f"--model must say which model it is for"
        ) from error
    return len(converted.adapters.adapters)


@dataclass(frozen=True)
class Converted:
    """A LoRA in a layout, made a batch of layers at a time."""

    adapters: AdapterSet
    denoiser: Denoiser
    dtype: torch.dtype
    layout: LayoutName

    @classmethod
    def of(cls, lora: LoRAFile, adapters: AdapterSet, denoiser: Denoiser, layout: LayoutName) -> "Converted":
        tensors = ((part, tensor) for parts in lora.layers.values() for part, tensor in parts.items())
        dtype = reduce(torch.promote_types, (tensor.dtype for part, tensor in tensors if part not in LENGTHS))
        return cls(adapters, denoiser, dtype, layout)

    def tensors(self) -> Iterator[Named]:
        refuse_several(self.adapters.adapters, self.layout)
        for batch in _batches(self.adapters, self.denoiser):
            yield from in_layout(batch, self.denoiser, self.dtype, self.layout).items()

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset(key for key, _ in self.tensors())


def _batches(adapters: AdapterSet, denoiser: Denoiser) -> Iterator[AdapterSet]:
    """At most NUM_BATCHES, about equally large; what the original code has as one layer stays together."""
    wholes = {
        f"{name}.{path}": f"{name}.{layer.name}"
        for name, net in denoiser.nets.items() for layer in known_originals(net) for path in layer.paths
    }  # fmt: skip
    groups: dict[str, set[str]] = {}
    for path in (*adapters.adapters, *map(_module, adapters.offsets)):
        groups.setdefault(wholes.get(path, path), set()).add(path)
    found = list(groups.values())
    size = math.ceil(len(found) / NUM_BATCHES)
    for begin in range(0, len(found), size):
        chosen = set[str]().union(*found[begin : begin + size])
        yield AdapterSet(
            {path: adapter for path, adapter in adapters.adapters.items() if path in chosen},
            {name: offset for name, offset in adapters.offsets.items() if _module(name) in chosen},
        )


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _for_model(lora: LoRAFile, model: str | Path, layout: LayoutName) -> Converted:
    has_lengths = any(part in parts for parts in lora.layers.values() for part in (SCALE, VECTOR))
    denoiser, path = skeleton(model, with_texts=_has_texts(lora), with_weights=has_lengths)
    denoiser = named_part(with_stored_weights(denoiser, path), lora.layers, lora.metadata)
    return Converted.of(lora, _adapters(lora, denoiser), denoiser, layout)


def _for_published(lora: LoRAFile, layout: LayoutName) -> Converted:
    """For the published models that it may be for, of which those that it fits must agree on its names."""
    known = PUBLISHED.get(lora.family, ())
    found: dict[str, Converted] = {}
    misfits: list[str] = []
    for published in known:
        whole = with_stored_weights(published_skeleton(published, with_texts=_has_texts(lora)), None)
        denoiser = named_part(whole, lora.layers, lora.metadata)
        try:
            adapters = _adapters(lora, denoiser)
        except ValueError as error:
            misfits.append(f"{published.name} ({error})")
            continue
        converted = Converted.of(lora, adapters, denoiser, layout)
        if not found or all(converted.keys != other.keys for other in found.values()):
            found[published.name] = converted
    if len(found) != 1:
        fits = f"fits {' and '.join(found)}, whose names differ" if found else "fits no published model"
        reason = f", not even {misfits[0]}" if misfits and not found else ""
        raise ValueError(
            f"{lora.path} looks like a LoRA for {lora.family}, but {fits}{reason}: --model must say which it is for"
        )
    return next(iter(found.values()))


def _adapters(lora: LoRAFile, denoiser: Denoiser) -> AdapterSet:
    state = {f"{layer}.{part}": tensor for layer, parts in lora.layers.items() for part, tensor in parts.items()}
    return adapters_from(state, denoiser, lora.metadata)


def _has_texts(lora: LoRAFile) -> bool:
    return any(TEXT.search(normal(layer)) for layer in lora.layers)
