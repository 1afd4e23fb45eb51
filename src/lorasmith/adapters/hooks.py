"""Adapters on a net: forward hooks, and inside prepacked layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.base import Adapter
from lorasmith.adapters.targets import adaptable_layers
from lorasmith.ops.prepacked import Packed
from lorasmith.types import Denoiser


class Removable(Protocol):
    """What takes an adapter or an offset off again."""

    def remove(self) -> None: ...


def attach(denoiser: Denoiser, adapters: AdapterSet) -> Sequence[Removable]:
    """Hangs every adapter on its layer and adds every offset; returns the handles that take them off.

    Offsets make new tensors for their parameters, so a denoiser that shares its weights leaves the others' as they are.
    """
    layers = adaptable_layers(denoiser.nets)
    hooks = [_hung(layers[path], _Hook(adapters.ran, path, adapter)) for path, adapter in adapters.adapters.items()]
    parameters = {
        f"{name}.{path}": parameter
        for name, net in denoiser.nets.items()
        for path, parameter in net.named_parameters(remove_duplicate=False)
    }
    return [*hooks, *(_Offset(parameters[path], offset) for path, offset in adapters.offsets.items())]


def _hung(layer: nn.Module, hook: "_Hook") -> Removable:
    """The adapter inside the function of a packed layer where it can be, else behind the layer."""
    if isinstance(layer, Packed) and hook.adapter.takes_base:
        return layer.take(hook.over)
    return layer.register_forward_hook(hook, with_kwargs=True)


class _Offset:
    """An offset on a parameter."""

    def __init__(self, parameter: nn.Parameter, offset: Tensor) -> None:
        self.parameter, self.before = parameter, parameter.data
        changed = self.before.float() + offset.to(self.before.device, torch.float32)
        parameter.data = changed.to(self.before.dtype)

    def remove(self) -> None:
        self.parameter.data = self.before


class _Hook:
    """What runs after a layer; an object, so that a deep copy of the net has adapters of its own."""

    def __init__(self, ran: set[str], path: str, adapter: Adapter) -> None:
        self.ran, self.path, self.adapter = ran, path, adapter

    def __call__(self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        self.ran.add(self.path)
        if next(self.adapter.parameters()).device != y.device:  # the net was moved after they were attached
            self.adapter.to(y.device)
        return self.adapter(args[0] if args else kwargs["input"], y, module.bias, module)

    def over(self, x: Tensor, layer: Packed) -> Tensor:
        """The adapted output of a layer that is yet to run; packed layers stay where they are."""
        self.ran.add(self.path)
        return self.adapter(x, layer, layer.bias, layer)


@contextmanager
def attached(denoiser: Denoiser, adapters: AdapterSet) -> Iterator[None]:
    """The denoiser predicts with the adapters as long as this is open."""
    handles = attach(denoiser, adapters)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
