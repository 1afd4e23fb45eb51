"""Where a loss or gradient that is not finite comes from: a group's samples run again, one by one."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.config.schema import Config
from lorasmith.devices import device_of
from lorasmith.ops.prepacked import Packed
from lorasmith.training.objective import noised, sample_losses
from lorasmith.types import Batch, Denoiser


def origin_of_non_finite(
    denoiser: Denoiser, adapters: AdapterSet, group: Batch, config: Config, scale: float = 1.0
) -> str:
    """The group's first sample whose loss or gradient is NaN or infinite, its time and where that began, in a line.

    The adapters are attached; scale is what the trainer multiplies losses by. No gradient is stored.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_of(denoiser).type, enabled=False):
        for index in range(len(group)):
            sample = group.part(index, index + 1)
            origin = _origin(denoiser, adapters, sample, config, scale / len(group))
            if origin:
                t = noised(denoiser, sample, config)[1].item()
                return f"sample {sample.names[0]} (number {sample.numbers[0]}, t {t:.4g}): {origin}"
    return "no sample alone: the sum over the group's samples overflows, or its norm"


def _origin(denoiser: Denoiser, adapters: AdapterSet, sample: Batch, config: Config, share: float) -> str | None:
    """What is not finite first in one sample's loss, or in the gradient of share times it; None: nothing."""
    with _watched(denoiser, adapters) as run:
        loss = sample_losses(denoiser, sample, config).sum()
    if lost := _non_finite(loss):
        x_t = noised(denoiser, sample, config)[0]
        inputs = {"its noised latent": x_t} | {f"its conditioning {name}": c for name, c in sample.cond.items()}
        bad_inputs = [f"{what} is {found}" for what, tensor in inputs.items() if (found := _non_finite(tensor))]
        return next(iter(bad_inputs), run.origin or f"the loss is {lost}")
    if not loss.requires_grad:  # it went to a net without adapters
        return None
    owners = [path for path, adapter in adapters.adapters.items() for _ in adapter.parameters()]
    grads = torch.autograd.grad(loss * share, adapters.parameters(), allow_unused=True)
    bad = {path: found for path, grad in zip(owners, grads, strict=True) if (found := _non_finite(grad))}
    reached = next((path for path in reversed(run.adapted) if path in bad), None)
    return f"the gradient of the adapter on {reached} is {bad[reached]}" if reached else None


@dataclass
class _Run:
    """What was seen of one run of the nets."""

    origin: str | None = None  # the first number that was not finite
    adapted: list[str] = field(default_factory=list)  # layers with adapters, as they ran

    def see(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module ended. Where its input was bad already, what made it so ran between modules."""
        if self.origin is None and (found := _non_finite(output)):
            found_before = _non_finite(args)
            what = f"input of {path} is {found_before}" if found_before else f"output of {path} is {found}"
            self.origin = f"the {what}"

    def see_adapted(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """An adapter added to what `see` saw."""
        self.adapted.append(path)
        self.see(f"{path} (with its adapter)", module, args, output)


@contextmanager
def _watched(denoiser: Denoiser, adapters: AdapterSet) -> Iterator[_Run]:
    """Sees the nets run as long as this is open: not blocks that run again in a backward pass after it."""
    run = _Run()
    with ExitStack() as hooks:
        for name, net in denoiser.nets.items():
            for path, module in net.named_modules(prefix=name):
                adapted = path in adapters.adapters
                if not (isinstance(module, Packed) and module.adapter):  # whose output is the adapted one
                    hooks.enter_context(module.register_forward_hook(partial(run.see, path), prepend=adapted))
                if adapted:
                    hooks.enter_context(module.register_forward_hook(partial(run.see_adapted, path)))
        yield run


@torch.no_grad()  # with gradients, checkpoints would count what isfinite saves and miss it in their second run
def _non_finite(value: Any) -> str | None:
    """The first number that is not finite, "nan" or "inf", in a tensor or a tuple, list or mapping of tensors."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else (value,)
    for tensor in values:
        if isinstance(tensor, Tensor) and len(bad := tensor[~tensor.isfinite()]):
            return "nan" if bad[0].isnan() else "inf"
    return None
