"""Memory: copies that share weights, and activations that are computed again instead of kept."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasmith.attach import adaptable_layers
from lorasmith.types import Denoiser

D = TypeVar("D", bound=Denoiser)


def shared_copy(denoiser: D, device: torch.device | None = None, dtype: torch.dtype | None = None) -> D:
    """A copy in evaluation mode, frozen; hooks and flags on it stay there.

    Every parameter shares its memory with the original's, but for those that another device or dtype makes anew.
    """
    frozen = {
        id(p): nn.Parameter(_normal(p).detach().to(device, dtype if p.is_floating_point() else None), False)
        for net in denoiser.nets.values()
        for p in net.parameters()
    }
    twin = copy.deepcopy(denoiser, frozen)
    for net in twin.nets.values():
        net.eval()
        for buffer in net.buffers():
            buffer.data = buffer.data.to(device)
    return twin


def _normal(parameter: nn.Parameter) -> torch.Tensor:
    """The tensor itself, but a copy of one made in inference mode, which no backward pass may use."""
    return parameter.clone() if parameter.is_inference() else parameter


def blocks(net: nn.Module) -> list[nn.Module]:
    """The innermost members of module lists that hold several layers: residual blocks, transformer blocks."""

    def weighted(module: nn.Module) -> bool:
        return len(adaptable_layers({"": module})) > 1

    found: list[nn.Module] = []
    for module in net.modules():
        if isinstance(module, nn.ModuleList):
            found += [member for member in module if weighted(member)]
    return [block for block in found if not any(other in found for other in block.modules() if other is not block)]


@contextmanager
def checkpointed(denoiser: Denoiser) -> Iterator[None]:
    """Every block keeps its inputs alone and runs again in the backward pass (Chen et al. 2016, section 4.1).

    Nothing in a frozen net draws random numbers, so none are kept for the second run.
    """
    held = [(block, block.forward) for net in denoiser.nets.values() for block in blocks(net)]
    for block, forward in held:
        block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, forward in held:
            block.forward = forward
