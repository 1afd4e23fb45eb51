"""A LoRA's tensors -> adapters for a model: all of them, or an error that lists what does not fit."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.base import Adapter, Layer
from lorasmith.adapters.parts import OFFSETS, fitting
from lorasmith.adapters.registry import adapter_from_file, kind_of, refuse_unread
from lorasmith.formats.detect import Layers, lora_family
from lorasmith.formats.dora_magnitude import as_in_the_paper, warn_of_doubt
from lorasmith.formats.experts import stated_expert
from lorasmith.formats.fused_qkv import split_fused
from lorasmith.formats.lora_weights import LoRAWeights
from lorasmith.formats.module_names import ModuleNames
from lorasmith.reporting.pace import counted
from lorasmith.types import Denoiser

log = logging.getLogger(__name__)

MAX_LISTED = 10
PASSES: tuple[Callable[[LoRAWeights, ModuleNames], LoRAWeights], ...] = (split_fused, as_in_the_paper)
"""What makes a file's layers those of a model, in this order."""


@dataclass(frozen=True)
class Found:
    """What a LoRA holds for a denoiser, and what of it fits no layer."""

    adapters: AdapterSet
    misfits: list[str]
    unknown: Mapping[str, str]  # {a layer that the denoiser does not have: what is said of it}


def adapters_from(
    state: Mapping[str, Tensor],
    denoiser: Denoiser,
    metadata: Mapping[str, str] | None = None,
    *,
    ignore_unknown: bool = False,
) -> AdapterSet:
    """A LoRA's adapters for this denoiser; ValueError that lists what does not fit.

    Weight and bias differences (`diff`, `diff_b`), which are not trained, are kept as offsets.
    metadata: that of its file, which says what its dora_scale is (`dora_magnitude`) and which expert it is for
        (`experts`).
    ignore_unknown: layers that the model does not have are skipped and logged.
    """
    expert = stated_expert(denoiser, metadata or {})
    if expert is not None:
        alone = adapters_from(state, expert.denoiser, metadata, ignore_unknown=ignore_unknown)
        return alone.moved(expert.beside)
    warn_of_doubt(state, metadata or {})
    lora = LoRAWeights.of(state, metadata)
    found = found_in(lora, ModuleNames(denoiser))
    if found.unknown and ignore_unknown:
        warn_of_left_out(found.unknown)
        found = replace(found, unknown={})
    refuse_misfits([found], lora.layers)
    return found.adapters


def found_in(lora: LoRAWeights, names: ModuleNames) -> Found:
    """What a LoRA, or whole layers of one, holds for a denoiser that has no experts, or for all of them."""
    for fit in PASSES:
        lora = fit(lora, names)
    misfits = [*lora.misfits]
    adapters: dict[str, Adapter] = {}
    offsets: dict[str, Tensor] = {}
    unknown: dict[str, str] = {}
    for key, parts in lora.layers.items():
        path = names.path(key)
        if path is None:
            unknown[key] = absent(key, parts)
            continue
        try:
            found = _offsets(path, names.modules[path], parts)
            if found.keys() & offsets.keys():
                raise ValueError("another key means the same parameter")
            offsets |= found
            trained = {part: tensor for part, tensor in parts.items() if part not in OFFSETS}
            if trained and path in adapters:
                raise ValueError("another key means the same layer")
            if trained:
                adapters[path] = _adapter(path, names.adaptable, trained)
        except ValueError as error:
            misfits.append(f"{key}: {error}")
    for path, adapter in adapters.items():
        if adapter.NEEDS_WEIGHT and f"{path}.weight" in offsets:
            misfits.append(f"{path}: diff changes the weight that {adapter.algorithm} reads, which cannot be trained")
    return Found(AdapterSet(adapters, offsets), misfits, unknown)


def refuse_misfits(found: Iterable[Found], layers: Layers) -> int:
    """ValueError that lists what does not fit of a LoRA's layers; returns how many layers it changes, one at least."""
    misfits: list[str] = []
    unknown: dict[str, str] = {}
    changed: set[str] = set()
    for piece in found:
        misfits += piece.misfits
        unknown |= piece.unknown
        changed |= {*piece.adapters.adapters, *(path.rpartition(".")[0] for path in piece.adapters.offsets)}
    misfits += unknown.values()
    if misfits or not changed:
        raise ValueError(_refusal(misfits, len(layers), lora_family(layers)))
    return len(changed)


def refuse_strange(parts: Mapping[str, Tensor]) -> None:
    """ValueError that names the parts of a layer that its algorithm does not know and that are no differences."""
    kind = kind_of(parts)
    refuse_unread(parts, {*(kind.SUFFIXES if kind else ("alpha",)), *OFFSETS})


def absent(layer: str, parts: Mapping[str, Tensor]) -> str:
    """What is said of a layer that the model does not have: that, or that its parts are not read."""
    try:
        refuse_strange(parts)
    except ValueError as error:
        return f"{layer}: {error}"
    return f"{layer} ({', '.join(sorted(parts))}): the model has no such layer"


def warn_of_left_out(unknown: Collection[str]) -> None:
    """Says which layers of a LoRA are not used, where there are any."""
    if unknown:
        what = counted(len(unknown), "layer")
        verb = "is" if len(unknown) == 1 else "are"
        log.warning("%s that the model does not have %s left out: %s", what, verb, listed([*unknown]))


def _offsets(path: str, module: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{path of a parameter: what is added to it}."""
    found = {}
    for part in OFFSETS.keys() & parts.keys():
        parameter = dict(module.named_parameters(recurse=False)).get(OFFSETS[part])
        if parameter is None:
            raise ValueError(f"a change of its {OFFSETS[part]} ({part}) has no place: the layer has no {OFFSETS[part]}")
        found[f"{path}.{OFFSETS[part]}"] = fitting(parts, part, tuple(parameter.shape))
    return found


def _adapter(path: str, adaptable: Mapping[str, nn.Module], parts: Mapping[str, Tensor]) -> Adapter:
    if path not in adaptable:
        kind = kind_of(parts)
        refuse_unread(parts, kind.SUFFIXES if kind else ())
        raise ValueError(f"{', '.join(sorted(parts))} cannot be trained on a layer of this kind")
    return adapter_from_file(Layer.of(path, adaptable[path]), parts, adaptable[path])


def _refusal(misfits: list[str], num_layers: int, family: str) -> str:
    if not misfits:
        return f"the LoRA must hold an adapter, got {counted(num_layers, 'layer')} without one"
    return f"the LoRA does not fit the model: {misfitting(misfits, num_layers, family)}"


def misfitting(misfits: Sequence[str], num_layers: int, family: str) -> str:
    """How many layers of a LoRA do not fit, what it looks made for, and which they are."""
    verb = "does" if len(misfits) == 1 else "do"
    return (
        f"{len(misfits)} of its {counted(num_layers, 'layer')} {verb} not, and it looks like one for {family}: "
        f"{listed(misfits)}"
    )


def listed(what: Sequence[str]) -> str:
    """Ten of them at most."""
    more = f"; and {len(what) - MAX_LISTED} more" if len(what) > MAX_LISTED else ""
    return f"{'; '.join(what[:MAX_LISTED])}{more}"
