"""The algorithms, one a file, and what they share."""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from lorasmith.adapters.algorithms import ALGORITHMS, UNREAD
from lorasmith.adapters.base import Adapter, Layer

Kind = type[Adapter]
ADAPTERS: tuple[Kind, ...] = tuple(algorithm.adapter() for algorithm in ALGORITHMS)
MARKS = frozenset[str]().union(*(kind.MARKS for kind in ADAPTERS))
CORES = {core: factors for kind in ADAPTERS for core, factors in kind.CORES.items()}
"""As an adapter's class has them, of all of them."""
IN_FLOAT32 = frozenset[str]().union(*(kind.IN_FLOAT32 for kind in ADAPTERS))
"""The parts of all that are stored in float32."""


def unread(parts: Mapping[str, Tensor], known: Collection[str]) -> list[str]:
    """The parts of a layer beyond those that are known, and what they are."""
    if "" in parts:
        return ["a tensor whose name has no part of an adapter"]
    left = {part: UNREAD.get(part) for part in sorted(set(parts) - set(known))}
    if "oft_blocks" in parts and parts["oft_blocks"].ndim == 4:
        left["oft_blocks"] = "of BOFT, as it has 4 axes"
    if "on_input" in left and "weight" in left:
        left["weight"] = UNREAD["on_input"]
    return [f"{part} ({what})" if what else part for part, what in left.items()]


def refuse_unread(parts: Mapping[str, Tensor], known: Collection[str]) -> None:
    """ValueError that names the parts of a layer beyond those that are known, and what they are; or where none is."""
    left = unread(parts, known)
    if left or not parts:
        raise ValueError(f"{', '.join(left)} {'is' if len(left) == 1 else 'are'} not read")


def kind_of(parts: Collection[str]) -> Kind | None:
    """The kind of adapter that has parts of these names in a file; one that extends another is told by its own."""
    found = [kind for kind in ADAPTERS if not kind.MARKS.isdisjoint(parts)]
    first = found[0] if found else None
    return next((kind for kind in found if kind.EXTENDS is first), first)


def needs_weight(parts: Iterable[str]) -> bool:
    """Whether parts of these names are read by an algorithm that needs the layer's weight."""
    names = set(parts)
    return any(kind.NEEDS_WEIGHT and not kind.MARKS.isdisjoint(names) for kind in ADAPTERS)


def adapter_from_file(layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> Adapter:
    """The adapter that a file's {suffix: tensor} make for a layer; ValueError where none does, or not all are used.

    base: the layer's module, for those that need its weight.
    """
    kind = kind_of(tensors)
    refuse_unread(tensors, kind.SUFFIXES if kind else ())
    assert kind is not None
    return kind.from_file(layer, tensors, base)
