"""Base weights that wait on the CPU, and gradients through them as int8 products."""

import torch

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.errors import needs_extra
from lorasmith.prepare.activation_checkpointing import blocks
from lorasmith.types import Denoiser


def refuse_useless_offloading(
    home: torch.device, adapters: AdapterSet, device: torch.device, checkpointing: bool
) -> None:
    """ValueError where offloading would save nothing, or where an adapter would miss a weight that is away.

    home: where the model's weights are.
    """
    rules = (
        (home.type == device.type, f"on {device.type}: the weights are there already"),
        (not checkpointing, "without gradient_checkpointing: every weight would stay for the backward pass"),
        *(
            (True, f"with {name}: it reads each layer's bias, which is away by then")
            for name in adapters.needing_biases
        ),
        *(
            (True, f"with {name}: it reads each layer's weight, which is away by then")
            for name in adapters.needing_weights
        ),
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
        raise needs_extra("offloading", "offload") from None
    for net in denoiser.nets.values():
        for block in blocks(net, 1):
            cpu_offload(block, device)
        for tensor in (*net.parameters(), *net.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
