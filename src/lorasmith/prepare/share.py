"""Memory: copies that share weights, and activations that are computed again instead of kept."""

import copy
import logging
from collections.abc import Container
from typing import TypeVar

import torch
from torch import nn

from lorasmith.reporting.progress import Advance, unwatched
from lorasmith.types import Denoiser

D = TypeVar("D", bound=Denoiser)
log = logging.getLogger(__name__)


def shared_copy(
    denoiser: D, device: torch.device | None = None, dtype: torch.dtype | None = None, *, but: Container[str] = (),
    advance: Advance = unwatched,
) -> D:  # fmt: skip
    """A copy in evaluation mode, frozen; hooks and flags on it stay there.

    Every parameter shares its memory with the original's, but for those that another device or dtype makes anew.
    but: parameters, as "<net>.<path>", that keep their device and dtype. advance: told the bytes of each of the others.
    """
    named = [
        (f"{name}.{path}", p)
        for name, net in denoiser.nets.items()
        for path, p in net.named_parameters(remove_duplicate=False)
    ]
    frozen = {id(p): nn.Parameter(_normal(p).detach(), False) for _, p in named}
    for p in {id(p): p for path, p in named if path not in but}.values():
        frozen[id(p)].data = frozen[id(p)].data.to(device, dtype if p.is_floating_point() else None)
        advance(p.nbytes)
    twin = copy.deepcopy(denoiser, frozen)
    for net in twin.nets.values():
        net.eval()
        for buffer in net.buffers():
            buffer.data = buffer.data.to(device)
    return twin


def _normal(parameter: nn.Parameter) -> torch.Tensor:
    """The tensor itself; of one made in inference mode, which no backward pass may use, another on the same memory."""
    if not parameter.is_inference():
        return parameter
    place = parameter.storage_offset(), parameter.shape, parameter.stride()
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device).set_(parameter.untyped_storage(), *place)


def num_bytes(denoiser: Denoiser) -> int:
    """Of its parameters, each counted once."""
    return sum(p.nbytes for p in {id(p): p for net in denoiser.nets.values() for p in net.parameters()}.values())
