"""Everything that a step changes: the adapters' masters, the optimizer, the scale of the losses, and counters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.config.schema import Config
from lorasmith.optim.leaves import Kept, Leaf, kept_of, restore
from lorasmith.optim.loss_scale import LossScale
from lorasmith.optim.master_weights import Masters
from lorasmith.types import Step

MASTER, OPTIMIZER, RECORD = "master", "optimizer", "record"
OWN_RATE = "own_rate"  # of a group of parameters, before the schedule


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
        groups = _groups(adapters, config)
        named = {name: parameter for own in groups.values() for name, parameter in own.items()}
        self.shapes = {name: parameter.shape for name, parameter in named.items()}
        self.masters = Masters([*named.values()])
        by_rate = {rate: Leaf.of_group(own, elementwise=config.optimizer.elementwise) for rate, own in groups.items()}
        leaves = [leaf for own in by_rate.values() for leaf in own]
        self.leaves = dict(zip(leaves, self.masters.split([leaf.shape for leaf in leaves]), strict=True))
        param_groups = [
            {"params": [self.leaves[leaf] for leaf in own], "lr": rate, OWN_RATE: rate} for rate, own in by_rate.items()
        ]
        self.optimizers = config.optimizer.build(param_groups, config.learning_rate)
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
        masters = zip(self.shapes, self.masters.parts(self.masters.vector.detach()), strict=True)
        kept = kept_of(self.leaves, self.optimizers)
        return {
            **{f"{MASTER}/{name}": master for name, master in masters},
            **{f"{OPTIMIZER}/{name}/{key}": value for name, state in kept.items() for key, value in state.items()},
            RECORD: torch.tensor(self.record, dtype=torch.float64).view(-1, 3),
        }

    def step(self, law: Callable[[float], float]) -> None:
        """One step of the optimizer; law: a group's own rate -> the rate of this step."""
        self.masters.share_gradient()
        for optimizer in self.optimizers:
            for param_group in optimizer.param_groups:
                param_group["lr"] = law(param_group[OWN_RATE])
            optimizer.step()

    def numbers(self) -> dict[str, Any]:
        """What is no tensor, as JSON holds it exactly."""
        return {
            "counters": dataclasses.asdict(self.counters),
            "scale": {"value": self.scale.value, "good": self.scale.good, "proven": self.scale.proven},
        }

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Becomes what `tensors` and `numbers` said of another state.

        ValueError, and nothing changed, where that one had other adapters or its optimizer lacks something.
        """
        refuse_misfit(tensors, self.shapes)
        restore(self.leaves, self.optimizers, _kept(tensors))
        self.is_sound = False
        held = _held(tensors)
        with torch.no_grad():
            self.masters.vector.copy_(torch.cat([held[name].flatten() for name in self.shapes]))
        self.masters.forget()
        self.masters.write()
        scale = numbers["scale"]
        self.scale.value, self.scale.good, self.scale.proven = scale["value"], scale["good"], scale["proven"]
        self.counters = Counters(**numbers["counters"])
        self.record = [(loss, lr, norm) for loss, lr, norm in tensors[RECORD].tolist()]
        self.is_sound = True


def _groups(adapters: AdapterSet, config: Config) -> dict[float, dict[str, nn.Parameter]]:
    """{learning rate: {"PATH/NAME": parameter}}."""
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for path, adapter in adapters.adapters.items():
        own = {f"{path}/{name}": parameter for name, parameter in adapter.named_parameters()}
        groups.setdefault(config.rate_of(path), {}).update(own)
    return groups


def refuse_misfit(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """ValueError where what `State.tensors` said is of other parameters than these {name: shape}."""
    held = _held(tensors)
    odd = sorted(held.keys() ^ shapes.keys()) or [name for name, shape in shapes.items() if held[name].shape != shape]
    if odd:
        verb = "differs" if len(odd) == 1 else "differ"
        raise ValueError(f"it must hold the same adapters, but {len(odd)} {verb}, such as {odd[0]}")


def _held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{parameter: its master}."""
    return {key.removeprefix(f"{MASTER}/"): t for key, t in tensors.items() if key.startswith(f"{MASTER}/")}


def _kept(tensors: Mapping[str, Tensor]) -> Kept:
    """What the optimizer kept of each parameter."""
    kept: Kept = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == OPTIMIZER:
            name, _, part = rest.rpartition("/")
            kept.setdefault(name, {})[part] = tensor
    return kept
