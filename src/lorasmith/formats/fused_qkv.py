"""Adapters of several layers as one adapter of the layer that the original code made of them, and the way back.

How that goes is each algorithm's own (`Adapter.fuse`, `Adapter.split`); differences of weights and biases go by rows.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.adapters.base import Member
from lorasmith.adapters.low_rank import split_rows
from lorasmith.adapters.parts import OFFSETS, Parts
from lorasmith.adapters.registry import kind_of, refuse_unread
from lorasmith.formats.lora_weights import LoRAWeights
from lorasmith.formats.module_names import ModuleNames


def joined(members: Sequence[Member], *, swapped: bool = False) -> dict[str, Tensor]:
    """The parts of the layer that the members make; ValueError where they are not of one algorithm that can be joined.

    Members without an adapter get one that changes nothing. swapped: the whole's halves come the other way round.
    """
    whole: dict[str, Tensor] = {}
    for part in OFFSETS:
        if any(part in member.parts for member in members):
            whole[part] = torch.cat([m.parts[part] if part in m.parts else m.zeros(part) for m in members])
    adapters = [{part: t for part, t in m.parts.items() if part not in OFFSETS} for m in members]
    kinds = sorted({kind for parts in adapters if (kind := kind_of(parts))}, key=lambda kind: kind.algorithm)
    if len(kinds) > 1:
        names = " and ".join(kind.algorithm for kind in kinds)
        raise ValueError(f"adapters must be of one algorithm to become one, got {names}")
    if kinds and len(members) == 1:
        whole |= adapters[0]
    elif kinds:
        whole |= kinds[0].fuse([Member(m.base, parts) for m, parts in zip(members, adapters, strict=True)])
    return _halves_swapped(whole) if swapped else whole


def parted(parts: Parts, members: Sequence[Member], *, swapped: bool = False) -> list[dict[str, Tensor]]:
    """What each member has of a whole's parts, nothing where that changes nothing; ValueError if it cannot be cut."""
    parts = _halves_swapped(parts) if swapped else parts
    if len(members) == 1:
        return [dict(parts)]
    rows = [member.rows for member in members]
    adapter = {part: tensor for part, tensor in parts.items() if part not in OFFSETS}
    kind = kind_of(adapter)
    if adapter:
        refuse_unread(adapter, kind.SUFFIXES if kind else ())
    found = kind.split(adapter, members) if kind else [{} for _ in members]
    for part in OFFSETS.keys() & parts.keys():
        for own, piece in zip(found, split_rows(parts, part, rows), strict=True):
            own[part] = piece
    return found


def _halves_swapped(parts: Parts) -> dict[str, Tensor]:
    """The parts of a layer with the halves of its rows the other way round; ValueError where a part mixes both."""
    turned = dict(parts)
    kind = kind_of(parts)
    for part in parts.keys() & {*(kind.BY_OUTPUT if kind else ()), *OFFSETS}:
        if len(parts[part]) % 2:
            raise ValueError(
                f"{part} must have an even number of rows for a layer in two halves, got {len(parts[part])}"
            )
        turned[part] = torch.cat(parts[part].chunk(2)[::-1])
    return turned


def split_fused(lora: LoRAWeights, names: ModuleNames) -> LoRAWeights:
    """The layers that are several modules of this model, cut into theirs and named by them; the rest as it is.

    What cannot be cut is told as a misfit.
    """
    cut: dict[str, Parts] = {}
    wholes: set[str] = set()
    misfits: list[str] = []
    for layer, parts in lora.layers.items():
        whole = names.whole(layer)
        if whole is None:
            continue
        wholes.add(layer)
        try:
            members = [Member(names.modules[path]) for path in whole.paths]
            own = dict(zip(whole.paths, parted(parts, members, swapped=whole.swapped), strict=True))
            before = {path: {**lora.layers.get(path, {}), **cut.get(path, {})} for path in own}
            if any(own[path].keys() & before[path].keys() for path in own):
                raise ValueError("another key means the same layer")
        except ValueError as error:
            misfits.append(f"{layer}: {error}")
            continue
        cut |= {path: {**before[path], **own[path]} for path in own if own[path]}
    kept = {layer: parts for layer, parts in lora.layers.items() if layer not in wholes}
    return replace(lora, layers={**kept, **cut}, misfits=(*lora.misfits, *misfits))
