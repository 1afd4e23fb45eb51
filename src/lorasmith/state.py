"""Everything that a step changes: the adapters' masters, the optimizer, the scale of the losses, and counters."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasmith.attach import AdapterSet
from lorasmith.config import Config
from lorasmith.optimizers import LossScale, Masters
from lorasmith.types import Step

MASTER, OPTIMIZER, RECORD = "master", "optimizer", "record"


@dataclass
class Counters:
    """Where a run is."""

    batch_size: int  # samples a micro-batch; fewer once memory ran out
    checkpointing: bool  # whether activations are computed again; so once memory ran out
    step: int = 0  # optimizer steps completed
    group: int = 0  # number of the next group of samples
    skipped: int = 0  # groups in a row that were left out, as their numbers were not finite
    returns: int = 0  # times that the run went back to an earlier step
    returned_to: int | None = None  # the step that it went back to last
    rate: float = 1.0  # what the learning rate is multiplied by, after going back


class State:
    """What makes an interrupted run end as an uninterrupted one does, together with its config, model and data."""

    def __init__(self, adapters: AdapterSet, config: Config, *, is_fp16: bool, group: int = 0) -> None:
        self.names = [
            f"{path}/{name}" for path, adapter in adapters.adapters.items() for name, _ in adapter.named_parameters()
        ]
        self.masters = Masters(adapters.parameters())
        self.config = config.optimizer
        self.optimizer = self.config.build([self.masters.vector], config.learning_rate)
        self.scale = LossScale(is_fp16)
        self.counters = Counters(config.batch_size, config.gradient_checkpointing, group=group)
        self.record: list[tuple[float, float, float]] = []  # loss, rate and gradient norm of each step
        self.is_sound = True  # False inside an update, and where one made weights that are not finite

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [loss for loss, _, _ in self.record]

    def steps(self, done: int) -> list[Step]:
        """The steps so far, after `done` of a LoRA that is continued; nobody knows any more how long they took."""
        return [Step(done + number, *values, seconds=0.0) for number, values in enumerate(self.record, 1)]

    def tensors(self) -> dict[str, Tensor]:
        """{"master/PATH/NAME" or "optimizer/PATH/NAME/KEY": tensor}, and "record" [N,3], float64, of N steps."""
        found = {f"{MASTER}/{name}": part for name, part in self._by_name(self.masters.vector.detach())}
        for key, value in self.optimizer.state.get(self.masters.vector, {}).items():
            found |= {f"{OPTIMIZER}/{name}/{key}": part for name, part in self._by_name(value)}
        return {**found, RECORD: torch.tensor(self.record, dtype=torch.float64).view(-1, 3)}

    def _by_name(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is kept of all parameters -> (name, part) of each; a single number, such as a count, is each one's."""
        parts = self.masters.parts(value) if value.ndim else [value] * len(self.names)
        return zip(self.names, parts, strict=True)

    def numbers(self) -> dict[str, Any]:
        """What is no tensor, as JSON holds it exactly."""
        return {
            "counters": dataclasses.asdict(self.counters),
            "scale": {"value": self.scale.value, "good": self.scale.good, "proven": self.scale.proven},
        }

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Becomes what `tensors` and `numbers` said of another state.

        ValueError, and nothing changed, where that one had other adapters or its optimizer kept other numbers.
        """
        held = {key.removeprefix(f"{MASTER}/"): t for key, t in tensors.items() if key.startswith(f"{MASTER}/")}
        own = dict(self._by_name(self.masters.vector.detach()))
        odd = sorted(held.keys() ^ own.keys()) or [n for n in self.names if held[n].shape != own[n].shape]
        if odd:
            raise ValueError(f"it must hold the same adapters, but {len(odd)} differ, such as {odd[0]}")
        kept: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == OPTIMIZER:
                name, _, part = rest.rpartition("/")
                kept.setdefault(part, {})[name] = tensor
        keeps = self._optimizer_keys()
        if kept and kept.keys() != keeps:
            raise ValueError(f"its optimizer must keep {_listed(keeps)} as this one does, got {_listed(set(kept))}")
        for part, values in kept.items():
            odd = [n for n in self.names if n not in values or values[n].shape not in ((), own[n].shape)]
            if odd:
                raise ValueError(
                    f"its optimizer must keep {part} of each weight, not so of {len(odd)}, such as {odd[0]}"
                )
        self.is_sound = False
        with torch.no_grad():
            self.masters.vector.copy_(self._in_one(held))
        self.masters.vector.grad = None
        self.masters.write()
        groups = self.optimizer.state_dict()["param_groups"]
        filled = {0: {part: self._in_one(values) for part, values in kept.items()}} if kept else {}
        self.optimizer.load_state_dict({"state": filled, "param_groups": groups})
        scale = numbers["scale"]
        self.scale.value, self.scale.good, self.scale.proven = scale["value"], scale["good"], scale["proven"]
        self.counters = Counters(**numbers["counters"])
        self.record = [(loss, lr, norm) for loss, lr, norm in tensors[RECORD].tolist()]
        self.is_sound = True

    def _in_one(self, values: Mapping[str, Tensor]) -> Tensor:
        """The opposite of _by_name."""
        found = [values[name] for name in self.names]
        return torch.cat([value.flatten() for value in found]) if found[0].ndim else found[0].clone()

    def _optimizer_keys(self) -> set[str]:
        """What such an optimizer keeps of a weight."""
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.zeros(1)
        optimizer = self.config.build([weight], 1.0)
        optimizer.step()
        return set(optimizer.state[weight])


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"
