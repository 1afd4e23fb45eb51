"""Modules that compute with kernels of our own what they compute otherwise, and that become as they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from lorasmith.ops.cpu.build import library
from lorasmith.ops.cpu.geglu import geglu
from lorasmith.ops.cpu.group_norm import group_norm
from lorasmith.types import Denoiser


def _gated(module: Any, x: Tensor) -> Tensor:
    return geglu(module.proj(x))


def _normed(module: Any, x: Tensor, *, has_silu: bool = False) -> Tensor:
    return group_norm(x, module.num_groups, module.weight, module.bias, module.eps, has_silu=has_silu)


def _residual(module: Any, x: Tensor, temb: Tensor) -> Tensor:
    """x [B,C,h,w], temb [B,D] -> [B,C',h,w]: two convolutions behind norm and SiLU each, beside a shortcut."""
    if not _is_plain(module):
        return type(module).forward(module, x, temb)
    h = module.conv1(_normed(module.norm1, x, has_silu=True))
    h = h + module.time_emb_proj(F.silu(temb))[:, :, None, None]
    h = module.conv2(_normed(module.norm2, h, has_silu=True))
    return (x if module.conv_shortcut is None else module.conv_shortcut(x)) + h


def _is_plain(block: Any) -> bool:
    """Whether a residual block is as UNets of the Stable Diffusion kind have it."""
    has_dropout = block.training and block.dropout.p > 0
    resizes = block.upsample is not None or block.downsample is not None
    has_time = block.time_emb_proj is not None and block.time_embedding_norm == "default" and not block.skip_time_act
    norms = type(block.norm1) is type(block.norm2) is nn.GroupNorm and type(block.nonlinearity) is nn.SiLU
    return has_time and norms and not resizes and not has_dropout and block.output_scale_factor == 1


FUSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    GEGLU: _gated, nn.GroupNorm: _normed, ResnetBlock2D: _residual,
}  # fmt: skip


@contextmanager
def fused(denoiser: Denoiser) -> Iterator[None]:
    """The denoiser's GEGLUs, group norms and residual blocks run our kernels as long as this is open, if there are any.

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
