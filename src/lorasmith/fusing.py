"""Modules that compute with kernels of our own what they compute otherwise, and that become as they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from lorasmith.kernels.geglu import geglu
from lorasmith.kernels.group_norm import group_norm
from lorasmith.kernels.native import library
from lorasmith.types import Denoiser


def _gated(module: Any, x: Tensor) -> Tensor:
    return geglu(module.proj(x))


def _normed(module: Any, x: Tensor) -> Tensor:
    return group_norm(x, module.num_groups, module.weight, module.bias, module.eps)


FUSED: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {GEGLU: _gated, nn.GroupNorm: _normed}


@contextmanager
def fused(denoiser: Denoiser) -> Iterator[None]:
    """The denoiser's GEGLUs and group norms run our kernels as long as this is open, where there are any.

    Subclasses stay as they are, and so do modules whose forward pass was replaced, by offloading for instance.
    """
    modules = {module for net in denoiser.nets.values() for module in net.modules() if type(module) in FUSED}
    changed = [module for module in modules if "forward" not in vars(module)] if library() is not None else []
    for module in changed:
        module.forward = partial(FUSED[type(module)], module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
