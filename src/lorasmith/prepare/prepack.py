"""Frozen layers in oneDNN's own layout: the same results, faster on the processor, for more memory."""

import logging
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lorasmith.devices import has_packed_products
from lorasmith.ops.prepacked import Packed, PackedConv2d, PackedLinear, PackedPointwise, packed
from lorasmith.reporting.pace import counted
from lorasmith.reporting.progress import SILENT, Progress, tracked
from lorasmith.types import Denoiser

log = logging.getLogger(__name__)

LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "none": (), "conv": (nn.Conv2d,), "all": (nn.Linear, nn.Conv2d),
}  # fmt: skip


def pack(denoiser: Denoiser, what: str, offsets: Collection[str] = (), progress: Progress = SILENT) -> int:
    """Packs the frozen layers of this kind ("none", "conv" or "all"), says what they take, and returns how many.

    Layers stay as they are on other devices, in dtypes that oneDNN has no fast products for, where they are more than
    plain layers, and where an offset, given by the path of its parameter, changes their weight. A net's first
    parameter, by which models tell their device and dtype, stays a plain weight with its channels last.
    """
    parameters = [[*net.named_parameters(name, remove_duplicate=False)] for name, net in denoiser.nets.items()]
    first = {id(own[0][1]) for own in parameters if own}
    changed = {id(parameter) for own in parameters for path, parameter in own if path in offsets}
    layers = {id(m): m for net in denoiser.nets.values() for m in net.modules() if type(m) in LAYERS[what]}
    plain = [layer for layer in layers.values() if _is_plain(layer) and id(layer.weight) not in changed]
    free = [layer for layer in plain if id(layer.weight) not in first]
    for layer in plain:
        if id(layer.weight) in first and isinstance(layer, nn.Conv2d):
            last = layer.weight.detach().contiguous(memory_format=torch.channels_last)
            layer.weight = nn.Parameter(last, requires_grad=False)
    watched = tracked(free, "packing layers", progress, len(free))
    num_bytes = sum(packed(layer, _kind(layer)).num_bytes for layer in watched)
    if free:
        log.debug("%s prepacked for the CPU: %.1f MB (pack)", counted(len(free), "layer"), num_bytes / 1e6)
    return len(free)


def _is_plain(layer: nn.Module) -> bool:
    """Whether it does what its class does, and its weight is frozen, its own, and one that oneDNN multiplies by."""
    weight = layer._parameters.get("weight")
    return (
        weight is not None
        and type(weight.data) is Tensor
        and not weight.requires_grad
        and weight.numel() > 0
        and has_packed_products(weight.device, weight.dtype)
        and not layer._forward_hooks
        and "forward" not in vars(layer)
        and (not isinstance(layer, nn.Conv2d) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str)))
    )


def _kind(layer: nn.Module) -> type[Packed]:
    if not isinstance(layer, nn.Conv2d):
        return PackedLinear
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.groups)
    return PackedPointwise if shape == ((1, 1), (1, 1), (0, 0), 1) else PackedConv2d
