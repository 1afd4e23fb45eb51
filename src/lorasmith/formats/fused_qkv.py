"""Adapters of several layers as one adapter of the layer that the original code made of them, and the way back.

How that goes is each algorithm's own (`Adapter.fuse`, `Adapter.split`); differences of weights and biases go by rows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorasmith.adapters.base import Member
from lorasmith.adapters.low_rank import split_rows
from lorasmith.adapters.parts import OFFSETS, Parts
from lorasmith.adapters.registry import kind_of, refuse_unread
from lorasmith.formats.keys import by_layer, split
from lorasmith.formats.module_names import ModuleNames
from lorasmith.types import Denoiser


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


def by_modules(state: Mapping[str, Tensor], denoiser: Denoiser) -> tuple[dict[str, Tensor], list[str]]:
    """A file's LoRA, whose layers that are several modules here are cut into theirs, and what cannot be cut.

    What is cut is named by the modules; the rest stays as it is.
    """
    names = ModuleNames(denoiser)
    modules = {f"{name}.{path}": m for name, net in denoiser.nets.items() for path, m in net.named_modules()}
    cut: dict[str, Tensor] = {}
    wholes: set[str] = set()
    misfits: list[str] = []
    for key, parts in by_layer(state).items():
        whole = names.whole(key)
        if whole is None:
            continue
        wholes.add(key)
        try:
            members = parted(parts, [Member(modules[path]) for path in whole.paths], swapped=whole.swapped)
            own = {f"{path}.{part}": t for path, m in zip(whole.paths, members, strict=True) for part, t in m.items()}
            if own.keys() & (cut.keys() | state.keys()):
                raise ValueError("another key means the same layer")
        except ValueError as error:
            misfits.append(f"{key}: {error}")
            continue
        cut |= own
    return {key: tensor for key, tensor in state.items() if split(key)[0] not in wholes} | cut, misfits
