"""Everything that a step changes: the adapters' masters, the optimizer, the scale of the losses, and counters."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.config.schema import Config
from lorasmith.optim.loss_scale import LossScale
from lorasmith.optim.master_weights import Masters
from lorasmith.optim.optimizers import Optimizer
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
        by_rate: dict[float, dict[str, nn.Parameter]] = {}
        for path, adapter in adapters.adapters.items():
            own = {f"{path}/{name}": parameter for name, parameter in adapter.named_parameters()}
            by_rate.setdefault(config.rate_of(path), {}).update(own)
        self.rates, self.groups = list(by_rate), [list(named) for named in by_rate.values()]  # rates, and names of each
        self.names = [name for group in self.groups for name in group]
        parameters = [parameter for named in by_rate.values() for parameter in named.values()]
        self.masters = Masters(parameters, [len(group) for group in self.groups])
        self.config = config.optimizer
        self.optimizer = self.config.build(
            [{"params": [vector], "lr": rate} for vector, rate in zip(self.masters.groups, self.rates, strict=True)],
            config.learning_rate,
        )
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
        kept = [self.optimizer.state.get(vector, {}) for vector in self.masters.groups]
        for key in kept[0]:
            found |= {f"{OPTIMIZER}/{name}/{key}": part for name, part in self._by_name(*(own[key] for own in kept))}
        return {**found, RECORD: torch.tensor(self.record, dtype=torch.float64).view(-1, 3)}

    def _by_name(self, *values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is kept of all parameters, or by groups -> (name, part); one number, such as a count, is each one's."""
        if values[0].ndim:
            parts = self.masters.parts(values[0] if len(values) == 1 else torch.cat(values))
        else:
            parts = [value for value, group in zip(values, self.groups, strict=True) for _ in group]
        return zip(self.names, parts, strict=True)

    def step(self, law: Callable[[float], float]) -> None:
        """One step of the optimizer; law: a group's own rate -> the rate of this step."""
        self.masters.share_gradient()
        for param_group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            param_group["lr"] = law(rate)
        self.optimizer.step()

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
        shapes = {name: part.shape for name, part in self._by_name(self.masters.vector.detach())}
        refuse_misfit(tensors, shapes, self.config)
        held, kept = _held(tensors), _kept(tensors)
        self.is_sound = False
        with torch.no_grad():
            self.masters.vector.copy_(_in_one(held, self.names))
        self.masters.forget()
        self.masters.write()
        groups = self.optimizer.state_dict()["param_groups"]
        filled = {
            number: {part: _in_one(values, names) for part, values in kept.items()}
            for number, names in enumerate(self.groups)
        }
        self.optimizer.load_state_dict({"state": filled if kept else {}, "param_groups": groups})
        scale = numbers["scale"]
        self.scale.value, self.scale.good, self.scale.proven = scale["value"], scale["good"], scale["proven"]
        self.counters = Counters(**numbers["counters"])
        self.record = [(loss, lr, norm) for loss, lr, norm in tensors[RECORD].tolist()]
        self.is_sound = True


def refuse_misfit(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], optimizer: Optimizer) -> None:
    """ValueError where what `State.tensors` said is of other parameters {name: shape}, or of another optimizer."""
    held, kept = _held(tensors), _kept(tensors)
    odd = sorted(held.keys() ^ shapes.keys()) or [name for name, shape in shapes.items() if held[name].shape != shape]
    if odd:
        verb = "differs" if len(odd) == 1 else "differ"
        raise ValueError(f"it must hold the same adapters, but {len(odd)} {verb}, such as {odd[0]}")
    refuse_other_optimizer(tensors, optimizer)
    for part, values in kept.items():
        odd = [name for name, shape in shapes.items() if name not in values or values[name].shape not in ((), shape)]
        if odd:
            raise ValueError(f"its optimizer must keep {part} of each weight, not so of {len(odd)}, such as {odd[0]}")


def refuse_other_optimizer(names: Iterable[str], optimizer: Optimizer) -> None:
    """ValueError where a state with tensors of these names is of an optimizer that keeps other numbers."""
    kept = {name.rpartition("/")[2] for name in names if name.startswith(f"{OPTIMIZER}/")}
    keeps = _optimizer_keys(optimizer)
    if kept and kept != keeps:
        raise ValueError(f"its optimizer must keep {_listed(keeps)} as this one does, got {_listed(kept)}")


def _held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{parameter: its master}."""
    return {key.removeprefix(f"{MASTER}/"): t for key, t in tensors.items() if key.startswith(f"{MASTER}/")}


def _kept(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{what the optimizer keeps: {parameter: it}}."""
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == OPTIMIZER:
            name, _, part = rest.rpartition("/")
            kept.setdefault(part, {})[name] = tensor
    return kept


def _optimizer_keys(config: Optimizer) -> set[str]:
    """What such an optimizer keeps of a weight."""
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    optimizer = config.build([weight], 1.0)
    optimizer.step()
    return set(optimizer.state[weight])


def _in_one(values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """What is kept of each of these parameters, as their group keeps it."""
    found = [values[name] for name in names]
    return torch.cat([value.flatten() for value in found]) if found[0].ndim else found[0].clone()


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"
