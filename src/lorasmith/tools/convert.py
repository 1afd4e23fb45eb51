"""A LoRA under the names of another program, for the model that it belongs to, of which no weights are loaded."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path

import torch

from lorasmith.adapters.frozen_weight import NoWeights
from lorasmith.adapters.registry import IN_FLOAT32, kind_of, needs_weight
from lorasmith.formats.detect import lora_family
from lorasmith.formats.dora_magnitude import KEY, warn_of_doubt
from lorasmith.formats.experts import named_part
from lorasmith.formats.keys import LAYOUT
from lorasmith.formats.lora_weights import LoRAWeights
from lorasmith.formats.module_names import ModuleNames, known_originals
from lorasmith.formats.read import Found, found_in, listed, refuse_misfits, warn_of_left_out
from lorasmith.formats.text_encoder_names import has_text_layers, text_layer
from lorasmith.formats.write import in_layout, metadata_in, refuse_several
from lorasmith.models.meta import published_skeleton, skeleton
from lorasmith.models.reference_configs import PUBLISHED
from lorasmith.reporting.progress import SILENT, Progress
from lorasmith.storage.safetensors import Named, write_streamed
from lorasmith.tools.lazy_weights import with_stored_weights
from lorasmith.tools.lora_layers import LoRAFile
from lorasmith.tools.other_sizes import at_sizes_of
from lorasmith.tools.outputs import derived, refuse_output
from lorasmith.types import Denoiser, LayoutName

log = logging.getLogger(__name__)

BATCH = 2**26  # bytes of the file


def convert(
    source: Path, output: Path, model: str | Path | None, layout: LayoutName, *, overwrite: bool = False,
    ignore_unknown: bool = False, progress: Progress = SILENT,
) -> int:  # fmt: skip
    """Writes the LoRA in a layout, in the widest dtype of its weights; returns how many layers it holds.

    model: None: the published one that it fits. ignore_unknown: layers that the model does not have are left out, and
    logged. ValueError where it fits none, or the layout has no way to say it.
    """
    refuse_output(output, overwrite=overwrite)
    lora = LoRAFile.opened(source)
    if not ignore_unknown:  # by which layers of strange parts alone are left out too
        lora.refuse_strange_parts()
    try:
        if model is None:
            (fitted,) = _published(lora, layout, progress, ignore_unknown=ignore_unknown)
        else:
            fitted = Fitted.of(lora, denoiser_for(lora, model), progress, ignore_unknown=ignore_unknown)
        if not fitted.num_layers:
            raise ValueError(f"{source} must hold a layer that the model has, got {listed(fitted.left_out)}")
        warn_of_left_out(fitted.left_out)
        fitted.write(output, layout)
    except NoWeights as error:
        raise ValueError(
            f"{source} holds DoRA, whose lengths depend on the model's weights in {layout}'s layout or in its own: "
            f"--model must say which model it is for"
        ) from error
    return fitted.num_layers


def _published(
    lora: LoRAFile, layout: LayoutName, progress: Progress, *, ignore_unknown: bool
) -> Sequence["Fitted"]:  # fmt: skip
    try:
        return fitted_to_published([lora], layout, ignore_unknown=ignore_unknown, progress=progress)
    except ValueError as error:
        raise ValueError(f"{lora.path} {error}: --model must say which it is for") from error


@dataclass(frozen=True)
class Fitted:
    """A LoRA that fits a denoiser, of which some layers are in memory at a time."""

    lora: LoRAFile
    denoiser: Denoiser
    left_out: Sequence[str] = ()  # layers of the file that the denoiser does not have
    num_layers: int = 0
    progress: Progress = SILENT

    @classmethod
    def of(
        cls, lora: LoRAFile, whole: Denoiser, progress: Progress = SILENT, *, ignore_unknown: bool = False
    ) -> "Fitted":  # fmt: skip
        """To what of a denoiser the file is for; ValueError that lists what fits no layer, or where there is nothing.

        ignore_unknown: what it does not have is left out.
        """
        untried = cls(lora, named_part(whole, lora.layers, lora.metadata), progress=progress)
        unknown = [layer for layer, paths in untried.paths.items() if not paths]
        if unknown and ignore_unknown:
            untried = replace(untried, lora=lora.of(lora.layers.keys() - unknown), left_out=unknown)
            if not untried.lora.layers:
                return untried
        return replace(untried, num_layers=refuse_misfits(untried.found("matching layers"), untried.lora.layers))

    def write(self, output: Path, layout: LayoutName) -> None:
        """The file in a layout; ValueError where that has no way to say it."""
        metadata = self.lora.metadata
        warn_of_doubt(self.lora.stored, metadata)
        kept = {key: value for key, value in metadata.items() if key not in (KEY, LAYOUT)}
        kinds = {kind for parts in self.lora.layers.values() if (kind := kind_of(parts))}
        of_t5 = [layer for layer in self.lora.layers if (text := text_layer(layer)) and text.encoder == "t5"]
        if layout == "diffusers" and of_t5:
            log.warning("diffusers reads no LoRA of T5, and will leave out: %s", listed(of_t5))
        said = {**derived(kept, f"convert to {layout}'s names"), **metadata_in(layout, kinds)}
        write_streamed(output, self.tensors(layout), lambda: said)

    @cached_property
    def names(self) -> ModuleNames:
        """The denoiser's modules by their names in files."""
        return ModuleNames(self.denoiser)

    @cached_property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """{layer as the file calls it: the modules that it means}."""
        found = {}
        for layer in self.lora.layers:
            path, whole = self.names.path(layer), self.names.whole(layer)
            found[layer] = (path,) if path else whole.paths if whole else ()
        return found

    def tensors(self, layout: LayoutName) -> Iterator[Named]:
        """{key: tensor} in a layout, in the widest dtype of its weights; ValueError where it has no way to say it."""
        refuse_several(itertools.chain(*self.paths.values()), layout)
        kept = (
            tensor for parts in self.lora.layers.values() for part, tensor in parts.items() if part not in IN_FLOAT32
        )
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in kept))
        for found in self.found("converting layers"):
            yield from in_layout(found.adapters, self.denoiser, dtype, layout).items()

    def found(self, what: str) -> Iterator[Found]:
        """Of a batch of layers at a time. what: the name of the stage that is shown."""
        with self.progress.stage(what, len(self.lora.layers)) as advance:
            for layers in filter(None, self._batches()):
                yield found_in(LoRAWeights.of(self.lora.read(layers), self.lora.metadata), self.names)
                advance(len(layers))

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


def denoiser_for(lora: LoRAFile, model: str | Path) -> Denoiser:
    """The denoiser of a diffusers folder, a single file or a hub id, with text encoders where the LoRA is for some."""
    with_weights = any(needs_weight(parts) for parts in lora.layers.values())
    return with_stored_weights(*skeleton(model, with_texts=has_text_layers(lora.layers), with_weights=with_weights))


def fitted_to_published(
    loras: Sequence[LoRAFile], layout: LayoutName, *, ignore_unknown: bool = False, progress: Progress = SILENT
) -> Sequence[Fitted]:
    """For the published models that all of them may be for, of which those that they fit must agree on their names.

    Several LoRAs that fit none may be for one of other sizes. ignore_unknown: those count that lack the fewest layers.
    ValueError that goes on where the files' names stand.
    """
    family = lora_family({layer: parts for lora in loras for layer, parts in lora.layers.items()})
    with_texts = any(has_text_layers(lora.layers) for lora in loras)
    outlines = {p.name: published_skeleton(p, with_texts=with_texts) for p in PUBLISHED.get(family, ())}
    found, misfits = _fits(outlines, loras, layout, progress, ignore_unknown=ignore_unknown)
    if not found and len(loras) > 1:
        found = _resized(loras, layout, progress, with_texts=with_texts)
    if len(found) != 1:
        fits = f"fits {' and '.join(found)}, whose names differ" if found else "fits no published model"
        reason = f", not even {misfits[0]}" if misfits and not found else ""
        look = "looks like a LoRA for" if len(loras) == 1 else "look like LoRAs for"
        what = fits if len(loras) == 1 else fits.replace("fits", "fit", 1)
        raise ValueError(f"{look} {family}, but {what}{reason}")
    return next(iter(found.values()))


def _resized(
    loras: Sequence[LoRAFile], layout: LayoutName, progress: Progress, *, with_texts: bool
) -> dict[str, list[Fitted]]:
    """As `_fits` has it, for models of other sizes; none where it is not sure which, or what their layers are."""
    try:
        outlines = at_sizes_of(loras, with_texts=with_texts)
    except ValueError as error:
        log.debug("sizes of no published model: %s", error)
        return {}
    found, misfits = _fits(outlines, loras, layout, progress)
    return found if len(found) == 1 and not misfits else {}


def _fits(
    outlines: Mapping[str, Denoiser],
    loras: Sequence[LoRAFile],
    layout: LayoutName,
    progress: Progress,
    *,
    ignore_unknown: bool = False,
) -> tuple[dict[str, list[Fitted]], list[str]]:
    """{a model that all of them fit: how}, of those that give them the same names one; and why they do not fit others.

    outlines: {a model: its skeleton}.
    """
    found: dict[str, list[Fitted]] = {}
    misfits: list[str] = []
    for name, outline in outlines.items():
        whole = with_stored_weights(outline, None)
        try:
            found[name] = [Fitted.of(lora, whole, progress, ignore_unknown=ignore_unknown) for lora in loras]
        except ValueError as error:
            misfits.append(f"{name} ({error})")
    lacking = {name: sum(len(fit.left_out) for fit in fits) for name, fits in found.items()}
    found = {name: fits for name, fits in found.items() if lacking[name] == min(lacking.values())}
    if len(found) > 1:
        by_keys = {_keys(fits, layout): name for name, fits in reversed(found.items())}
        found = {name: fits for name, fits in found.items() if name in by_keys.values()}
    return found, misfits


def _keys(fits: Sequence[Fitted], layout: LayoutName) -> frozenset[str]:
    return frozenset(key for fit in fits for key, _ in fit.tensors(layout))
