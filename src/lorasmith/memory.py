"""Memory: copies that share weights, activations computed again, weights that wait on the CPU, int8 gradients."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorasmith.attach import AdapterSet, adaptable_layers
from lorasmith.devices import device_of
from lorasmith.types import Denoiser

D = TypeVar("D", bound=Denoiser)
log = logging.getLogger(__name__)
INNERMOST = 5  # the greatest depth: nets that nest deeper give their innermost blocks too


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
        block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, forward in held:
            block.forward = forward


def refuse_useless_offloading(base: Denoiser, adapters: AdapterSet, device: torch.device, checkpointing: bool) -> None:
    """ValueError where offloading would save nothing, or where an adapter would miss a weight that is away."""
    rules = (
        (device_of(base).type == device.type, f"on {device.type}: the weights are there already"),
        (not checkpointing, "without gradient_checkpointing: every weight would stay for the backward pass"),
        ("OFT" in adapters.algorithms, "with OFT: it reads each layer's bias, which is away by then"),
        (bool(adapters.offsets), "with this existing_lora: it changes weights themselves (diff), which are away"),
    )
    for broken, why in rules:
        if broken:
            raise ValueError(f"offloading must be False {why}")


def offload(denoiser: Denoiser, device: torch.device) -> None:
    """The blocks' weights stay where they are and visit the device while their layer runs; the rest moves there.

    By accelerate's hooks, which put a new parameter in place for each visit: the one that a backward pass needs stays
    right, which is not so where the data of a parameter are swapped (docs/memory.md).
    """
    try:
        from accelerate import cpu_offload
    except ModuleNotFoundError:
        raise ValueError("offloading needs the extra 'offload': pip install 'lorasmith[offload]'") from None
    for net in denoiser.nets.values():
        for block in blocks(net, 1):
            cpu_offload(block, device)
        for tensor in (*net.parameters(), *net.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)


def quantize_backward(denoiser: Denoiser) -> None:
    """The gradients of linear layers' inputs become int8 products, each row scaled by its largest number.

    By torchao's linear layer for mixed precision (a prototype there); weights and forward pass stay in their dtype.
    """
    try:
        from torchao.prototype.quantized_training import (  # pyright: ignore[reportMissingImports]
            Int8MixedPrecisionTrainingConfig,
        )
        from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]
    except ImportError:  # an older torchao has the module without the class
        raise ValueError("quantized_backward needs the extra 'quantized': pip install 'lorasmith[quantized]'") from None
    # torchao gives a layer its own class, so one with a forward of its own must stay as it is
    layers = [m for net in denoiser.nets.values() for m in net.modules() if type(m) is nn.Linear]
    if not layers:
        raise ValueError("quantized_backward must be False: the model has no torch.nn.Linear")
    config = Int8MixedPrecisionTrainingConfig(output=False, grad_input=True, grad_weight=False, module_swap=True)
    for layer in layers:
        quantize_(layer, config)
        layer.register_forward_hook(_contiguous_gradient)


def _contiguous_gradient(layer: nn.Module, args: Any, y: Tensor) -> None:
    """torchao takes views of gradients, and those that attention passes back have none."""
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)
