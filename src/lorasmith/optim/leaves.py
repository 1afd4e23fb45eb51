"""The tensors that an optimizer steps on, and what it keeps of each parameter, by the parameter's name."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

Kept = dict[str, dict[str, Tensor]]
"""{parameter: {what the optimizer calls it: what it keeps}}."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """All parameters of a group one after the other in a flat tensor [N]; or one, as a vector [n] or a matrix [n,m]."""

    shapes: Mapping[str, torch.Size]  # {name: of the parameter}
    is_flat: bool

    @classmethod
    def of_group(cls, group: Mapping[str, Tensor], *, elementwise: bool) -> "list[Leaf]":
        """What an optimizer, elementwise or not, steps on for a group {name: parameter}."""
        shapes = {name: parameter.shape for name, parameter in group.items()}
        return [cls(shapes, True)] if elementwise else [cls({name: shape}, False) for name, shape in shapes.items()]

    @property
    def shape(self) -> Sequence[int]:
        if self.is_flat:
            return (sum(map(math.prod, self.shapes.values())),)
        (shape,) = self.shapes.values()
        return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape),)

    def split(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is kept of it -> (name, what is kept of the parameter); one number, such as a count, is each one's."""
        if self.is_flat and value.ndim:
            parts = value.split([math.prod(shape) for shape in self.shapes.values()])
            return ((name, part.view(shape)) for (name, shape), part in zip(self.shapes.items(), parts, strict=True))
        return ((name, value) for name in self.shapes)

    def joined(self, kept: Kept) -> dict[str, Tensor]:
        """What was split -> what is kept of it; ValueError where something of a parameter is missing."""
        states = [kept.get(name, {}) for name in self.shapes]
        return {key: self._joined(key, states) for key in {key: None for state in states for key in state}}

    def _joined(self, key: str, states: Sequence[Mapping[str, Tensor]]) -> Tensor:
        named = zip(self.shapes.items(), states, strict=True)
        lacking = [name for (name, shape), state in named if not self._fits(state.get(key), shape)]
        if lacking:
            raise ValueError(
                f"its optimizer must keep {key} of each weight, not so of {len(lacking)}, such as {lacking[0]}"
            )
        values = [state[key] for state in states]
        is_apart = self.is_flat and values[0].ndim > 0
        return torch.cat([value.flatten() for value in values]) if is_apart else values[0].clone()

    def _fits(self, value: Tensor | None, shape: torch.Size) -> bool:
        """Whether it can be what is kept of a parameter; where shapes matter, an optimizer may keep any."""
        return value is not None and (not self.is_flat or value.shape in ((), shape))


def kept_of(leaves: Mapping[Leaf, Tensor], optimizers: Sequence[Optimizer]) -> Kept:
    """What the optimizers keep of each parameter; leaves: {leaf: its tensor}."""
    kept: Kept = {}
    for leaf, tensor in leaves.items():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(tensor, {}).items():
                for name, part in leaf.split(value):
                    kept.setdefault(name, {})[key] = part
    return kept


def restore(leaves: Mapping[Leaf, Tensor], optimizers: Sequence[Optimizer], kept: Kept) -> None:
    """The optimizers keep this again; ValueError, and nothing changed, where something is missing."""
    states = {tensor: leaf.joined(kept) for leaf, tensor in leaves.items()}
    for optimizer in optimizers:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        own = {number: states[tensor] for number, tensor in enumerate(tensors) if states[tensor]}
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
