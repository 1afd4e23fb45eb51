"""Activations that are recomputed in the backward pass instead of kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasmith.adapters.targets import adaptable_layers
from lorasmith.ops.cpu.attention import kept_results
from lorasmith.prepare.share import log
from lorasmith.types import Denoiser

INNERMOST = 5  # the greatest depth: nets that nest deeper give their innermost blocks too


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
