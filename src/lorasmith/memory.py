"""Memory: copies that share weights, and activations that are computed again instead of kept."""

import copy
import ctypes
import logging
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasmith.kernels.attention import kept_results
from lorasmith.progress import Advance, unwatched
from lorasmith.targets import adaptable_layers
from lorasmith.types import Denoiser

D = TypeVar("D", bound=Denoiser)
log = logging.getLogger(__name__)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
INNERMOST = 5  # the greatest depth: nets that nest deeper give their innermost blocks too


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


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """On the processor, memory that is freed stays with the process for the next step, until this is closed.

    glibc gives large pieces back to the system at once, and each page that is fetched again costs a fault. Elsewhere
    nothing changes.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if device.type != "cpu" or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, 32 * 2**20)  # the greatest there is
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)


def blocks(net: nn.Module, depth: int) -> list[nn.Module]:
    """The members of module lists that hold several layers: residual blocks, transformer blocks, whole UNet stages.

    depth: 1 gives those that are in no other list, each further one goes a list deeper, and where a branch nests no
    deeper its innermost block is given; 5 gives the innermost ones.
    """
    found: list[nn.Module] = []
    for child in net.children():
        # a list in a list is no block: only modules that run can run again
        listed = isinstance(net, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        if listed and len(adaptable_layers({"": child})) > 1:
            deeper = [] if depth == 1 else blocks(child, depth if depth == INNERMOST else depth - 1)
            found += deeper or [child]
        else:
            found += blocks(child, depth)
    return list(dict.fromkeys(found))  # a module may be in two lists


@contextmanager
def checkpointed(denoiser: Denoiser, depth: int) -> Iterator[None]:
    """Blocks of this depth keep their inputs alone and run again in the backward pass (Chen et al. 2016, section 4.1).

    Shallow blocks keep less, but more is held while one of them runs again. The most bytes ever held are fewest at
    depth 2, the default, for the UNets of Stable Diffusion 1 and 2, and at 3 for SDXL's, which nests ten blocks in one;
    no depth is clearly slower. Lists of transformers do not nest: all depths are one (measured in docs/memory.md).
    Nothing in a frozen net draws random numbers, so none are kept for the second run.
    """
    if not any(blocks(net, depth) for net in denoiser.nets.values()):
        log.warning("gradient_checkpointing does nothing: the model has no lists of blocks")
    held = [(block, block.forward) for net in denoiser.nets.values() for block in blocks(net, depth)]
    for block, forward in held:
        block.forward = partial(
            checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=kept_results
        )
    try:
        yield
    finally:
        for block, forward in held:
            block.forward = forward
