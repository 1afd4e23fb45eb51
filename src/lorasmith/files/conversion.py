"""A LoRA under the names of another program, for the model that it belongs to, of which no weights are loaded."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path

import torch

from lorasmith.adapters.base import NoWeights
from lorasmith.adapters.dora import SCALE, VECTOR
from lorasmith.config import LayoutName
from lorasmith.dora_scales import KEY, warn_of_doubt
from lorasmith.experts import named_part
from lorasmith.families.published import PUBLISHED
from lorasmith.families.skeletons import published_skeleton, skeleton
from lorasmith.file_layouts import in_layout, metadata_in, refuse_several
from lorasmith.files.factors import LoRAFile
from lorasmith.files.outputs import derived, refuse_output
from lorasmith.files.stored import with_stored_weights
from lorasmith.layouts import LAYOUT, ModuleNames, known_originals, normal
from lorasmith.loading import Found, found_in, refuse_misfits
from lorasmith.tensor_file import Named, write_streamed
from lorasmith.types import Denoiser

LENGTHS = ("alpha", SCALE, VECTOR)
"""What is kept in float32 in a file of 16 bits."""
BATCH = 2**26  # bytes of the file
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
    warn_of_doubt(lora.stored, lora.metadata)
    before = {key: value for key, value in lora.metadata.items() if key not in (KEY, LAYOUT)}
    metadata = derived(before, f"convert to {layout}'s names")
    algorithms = {algorithm for layer in lora.layers if (algorithm := lora.algorithm(layer))}
    try:
        fitted = _for_published(lora, layout) if model is None else _for_model(lora, model)
        write_streamed(output, fitted.tensors(layout), lambda: {**metadata, **metadata_in(layout, algorithms)})
    except NoWeights as error:
        raise ValueError(
            f"{source} holds DoRA, whose lengths depend on the model's weights in {layout}'s layout or in its own: "
            f"--model must say which model it is for"
        ) from error
    return fitted.num_adapters


@dataclass(frozen=True)
class Fitted:
    """A LoRA that fits a denoiser, of which some layers are in memory at a time."""

    lora: LoRAFile
    denoiser: Denoiser
    num_adapters: int = 0

    @classmethod
    def of(cls, lora: LoRAFile, denoiser: Denoiser) -> "Fitted":
        """ValueError that lists what fits no layer, or where there is nothing."""
        untried = cls(lora, denoiser)
        return replace(untried, num_adapters=refuse_misfits(untried.found(), lora.layers))

    @cached_property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """{layer as the file calls it: the modules that it means}."""
        names = ModuleNames(self.denoiser)
        found = {}
        for layer in self.lora.layers:
            path, whole = names.path(layer), names.whole(layer)
            found[layer] = (path,) if path else whole.paths if whole else ()
        return found

    def tensors(self, layout: LayoutName) -> Iterator[Named]:
        """{key: tensor} in a layout, in the widest dtype of its weights; ValueError where it has no way to say it."""
        refuse_several(itertools.chain(*self.paths.values()), layout)
        kept = (tensor for parts in self.lora.layers.values() for part, tensor in parts.items() if part not in LENGTHS)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in kept))
        for found in self.found():
            yield from in_layout(found.adapters, self.denoiser, dtype, layout).items()

    def found(self) -> Iterator[Found]:
        """Of a batch of layers at a time."""
        for layers in self._batches():
            yield found_in(self.lora.read(layers), self.denoiser, self.lora.metadata)

    def _batches(self) -> Iterator[list[str]]:
        """The file's layers; what the original code has as one, and what means the same module, stays together."""
        originals = ((name, layer) for name, net in self.denoiser.nets.items() for layer in known_originals(net))
        wholes = {f"{name}.{path}": layer.name for name, layer in originals for path in layer.paths}
        groups: dict[str, list[str]] = {}
        for layer, paths in self.paths.items():
            first = paths[0] if paths else layer
            groups.setdefault(wholes.get(first, first), []).append(layer)
        batch: list[str] = []
        size = 0
        for group in groups.values():
            more = self.lora.num_bytes(group)
            if batch and size + more > BATCH:
                yield batch
                batch, size = [], 0
            batch, size = batch + group, size + more
        yield batch


def _for_model(lora: LoRAFile, model: str | Path) -> Fitted:
    has_lengths = any(part in parts for parts in lora.layers.values() for part in (SCALE, VECTOR))
    denoiser, path = skeleton(model, with_texts=_has_texts(lora), with_weights=has_lengths)
    return Fitted.of(lora, named_part(with_stored_weights(denoiser, path), lora.layers, lora.metadata))


def _for_published(lora: LoRAFile, layout: LayoutName) -> Fitted:
    """For the published models that it may be for, of which those that it fits must agree on its names."""
    found: dict[str, Fitted] = {}
    misfits: list[str] = []
    for published in PUBLISHED.get(lora.family, ()):
        whole = with_stored_weights(published_skeleton(published, with_texts=_has_texts(lora)), None)
        try:
            found[published.name] = Fitted.of(lora, named_part(whole, lora.layers, lora.metadata))
        except ValueError as error:
            misfits.append(f"{published.name} ({error})")
    if len(found) > 1:
        by_keys = {frozenset(key for key, _ in fit.tensors(layout)): name for name, fit in reversed(found.items())}
        found = {name: fitted for name, fitted in found.items() if name in by_keys.values()}
    if len(found) != 1:
        fits = f"fits {' and '.join(found)}, whose names differ" if found else "fits no published model"
        reason = f", not even {misfits[0]}" if misfits and not found else ""
        raise ValueError(
            f"{lora.path} looks like a LoRA for {lora.family}, but {fits}{reason}: --model must say which it is for"
        )
    return next(iter(found.values()))


def _has_texts(lora: LoRAFile) -> bool:
    return any(TEXT.search(normal(layer)) for layer in lora.layers)
