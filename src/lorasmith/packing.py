"""Frozen layers in oneDNN's own layout: the same results, faster on the processor, for more memory."""

import logging
from collections.abc import Collection

from torch import Tensor, nn

from lorasmith.adapters.layer import Layer
from lorasmith.devices import has_packed_products
from lorasmith.kernels.packed import Packed, PackedConv2d, PackedLinear
from lorasmith.types import Denoiser

log = logging.getLogger(__name__)

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "none": (), "conv": (nn.Conv2d,), "all": (nn.Linear, nn.Conv2d),
}  # fmt: skip


def pack(denoiser: Denoiser, what: str, offsets: Collection[str] = ()) -> None:
    """Puts packed layers in the place of frozen ones of this kind ("none", "conv" or "all"), and says what they take.

    Layers stay as they are on other devices, in dtypes that oneDNN has no fast products for, where they are more than
    plain layers, and where an offset, given by the path of its parameter, changes them.
    """
    changed = {path.rpartition(".")[0] for path in offsets}
    num_packed, num_bytes = 0, 0
    for name, net in denoiser.nets.items():
        for path, layer in list(net.named_modules()):
            is_free = path and f"{name}.{path}" not in changed  # a net that is one layer stands in nothing
            packed = _packed(path, layer, KINDS[what]) if is_free else None
            if packed is not None:
                parent, _, child = path.rpartition(".")
                setattr(net.get_submodule(parent), child, packed)
                num_packed, num_bytes = num_packed + 1, num_bytes + packed.num_bytes
    if num_packed:
        log.info("%d layers packed for this processor: %.2f GB in blocks (pack)", num_packed, num_bytes / 1e9)


def _packed(path: str, layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Packed | None:
    if type(layer) not in kinds:
        return None
    weight = layer.weight
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.requires_grad or not weight.numel():
        return None
    if not has_packed_products(weight.device, weight.dtype):
        return None
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer)
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    conv = Layer.of(path, layer).conv
    assert conv is not None
    return PackedConv2d(layer, conv)
