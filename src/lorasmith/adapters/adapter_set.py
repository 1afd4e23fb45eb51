"""The set of adapters, and how they hang on a net: by forward hooks."""

import logging
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import Algorithm
from lorasmith.adapters.base import Adapter, Layer, normal
from lorasmith.adapters.parts import OFFSETS
from lorasmith.adapters.targets import Targets, adaptable_layers
from lorasmith.types import Denoiser, unread

log = logging.getLogger(__name__)


def _refuse_wrapped(denoiser: Denoiser) -> None:
    """ValueError where PEFT holds adapters in the model, whose own layers would be adapted."""
    for name, net in denoiser.nets.items():
        for path, module in net.named_modules():
            if type(module).__module__.startswith("peft."):
                raise ValueError(
                    f"model must hold no adapters of PEFT, got one at {name}.{path}: fuse or unload them first"
                )


def _refuse_equal_keys(denoiser: Denoiser, paths: Iterable[str]) -> None:
    """ValueError where two layers would have one name in a LoRA file, as readers compare them."""
    named: dict[str, str] = {}
    for path in paths:
        key = normal(denoiser.file_key(path))
        if key in named:
            raise ValueError(f"targets must have different names in a file, got {named[key]} and {path} as {key}")
        named[key] = path


def targeted(denoiser: Denoiser, targets: Targets) -> set[str]:
    """The paths of the layers that targets mean and that predictions depend on."""
    idle = unread(denoiser)
    return {path for path in adaptable_layers(denoiser.nets) if targets.matches(path) and path not in idle}


class AdapterSet:
    """Adapters by layer path, and offsets by parameter path, which are added to the parameter and never trained."""

    def __init__(self, adapters: Mapping[str, Adapter], offsets: Mapping[str, Tensor] | None = None) -> None:
        self.adapters = dict(adapters)
        self.offsets = dict(offsets or {})
        self.ran: set[str] = set()

    @classmethod
    def new(cls, denoiser: Denoiser, algorithm: Algorithm, targets: Targets, seed: int) -> "AdapterSet":
        """A new adapter for each target whose output is used; ValueError if no layer matches."""
        layers = adaptable_layers(denoiser.nets)
        paths = targeted(denoiser, targets)
        chosen = {path: Layer.of(path, module) for path, module in layers.items() if path in paths}
        if not chosen:
            raise ValueError(
                f"targets must match a layer, got preset {targets.preset!r}, include {list(targets.include)}, exclude "
                f"{list(targets.exclude)} for {len(layers)} layers such as {', '.join(list(layers)[:3]) or 'none'}"
            )
        _refuse_wrapped(denoiser)
        _refuse_equal_keys(denoiser, chosen)
        adapters = {}
        for path, layer in chosen.items():
            try:
                adapters[path] = algorithm.build(layer, path, seed, layers[path])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return cls(adapters)

    @property
    def kinds(self) -> list[type[Adapter]]:
        """The classes of its adapters, each once, by the names of their algorithms."""
        return sorted({type(adapter) for adapter in self.adapters.values()}, key=lambda kind: kind.algorithm)

    @property
    def algorithms(self) -> list[str]:
        """The names of its adapters' algorithms, each once, sorted; ranks and alphas likewise."""
        return sorted({kind.algorithm for kind in self.kinds})

    @property
    def needing_weights(self) -> list[str]:
        """Those of the algorithms that read their layers' weights."""
        return sorted({kind.algorithm for kind in self.kinds if kind.NEEDS_WEIGHT})

    @property
    def needing_biases(self) -> list[str]:
        """Those that read their layers' biases."""
        return sorted({kind.algorithm for kind in self.kinds if kind.NEEDS_BIAS})

    @property
    def ranks(self) -> list[int]:
        return sorted({adapter.rank for adapter in self.adapters.values() if adapter.rank is not None})

    @property
    def alphas(self) -> list[float]:
        return sorted({adapter.alpha for adapter in self.adapters.values() if adapter.alpha is not None})

    def to(self, device: torch.device, dtype: torch.dtype) -> "AdapterSet":
        """Moves the parameters; returns itself."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device, dtype)
        return self

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    def file_state(self, denoiser: Denoiser, dtype: torch.dtype) -> dict[str, Tensor]:
        """{key in a LoRA file: tensor}, sorted; weights in this dtype."""
        state = {
            f"{denoiser.file_key(path)}.{suffix}": tensor
            for path, adapter in self.adapters.items()
            for suffix, tensor in adapter.file_tensors(dtype).items()
        }
        parts = {name: part for part, name in OFFSETS.items()}
        for path, offset in self.offsets.items():
            module_path, _, name = path.rpartition(".")
            state[f"{denoiser.file_key(module_path)}.{parts[name]}"] = offset
        return dict(sorted(state.items()))

    def moved(self, nets: Mapping[str, str]) -> "AdapterSet":
        """Those on these nets alone, on nets of other names: {name: its new one}."""

        def own(values: Mapping[str, Any]) -> dict[str, Any]:
            parted = ((path.partition("."), value) for path, value in values.items())
            return {f"{nets[net]}.{rest}": value for (net, _, rest), value in parted if net in nets}

        return AdapterSet(own(self.adapters), own(self.offsets))

    def freeze(self) -> "AdapterSet":
        """Makes the parameters constants; returns itself."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        return self

    @property
    def nets(self) -> set[str]:
        """The names of the nets that they hang on."""
        return {_net(path) for path in self.adapters}

    def refuse_unused(self, gradients: Mapping[int, Tensor], unseen: Set[str], denoiser: Denoiser) -> set[str]:
        """The nets among `unseen` that ran: their adapters must have run too, and their output reached the loss.

        ValueError that names those that did not. gradients: {id of a parameter: its gradient}, of those that got one.
        A net whose adapters all rested is taken as one that no sample went to, unless no net is left that ran instead.
        Adapters whose gradient is exactly zero are named in a warning: most likely their output is thrown away, but a
        net may also ignore it for this input alone. Those that no prediction depends on, of another program's file, may
        be there and learn nothing.
        """
        running = {_net(path) for path in self.ran}
        if not running and denoiser.nets.keys() <= self.nets:
            running = self.nets
        running &= unseen
        exempt = unread(denoiser)
        paths = [path for path in self.adapters if _net(path) in running and path not in exempt]
        idle = [path for path in paths if path not in self.ran]
        grads = {path: [gradients.get(id(w)) for w in self.adapters[path].parameters()] for path in paths}
        cut_off = [path for path, found in grads.items() if path in self.ran and any(g is None for g in found)]
        for faulty, what in ((idle, "never ran"), (cut_off, "got no gradient")):
            if faulty:
                raise ValueError(f"{self._listed(faulty)} {what}; add them to targets.exclude")
        zero = [path for path, found in grads.items() if not any(g.any() for g in found if g is not None)]
        if zero:
            log.warning("%s got a gradient of zero in the first step: do their layers matter?", self._listed(zero))
        return running

    def _listed(self, paths: list[str]) -> str:
        shown = ", ".join(paths[:3]) + (", …" if len(paths) > 3 else "")
        return f"{len(paths)} of {len(self.adapters)} adapters ({shown})"


def _net(path: str) -> str:
    return path.partition(".")[0]
