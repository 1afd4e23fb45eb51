"""Base weights that wait on the CPU, and gradients through them as int8 products."""

import torch

from lorasmith.errors import needs_extra
from lorasmith.prepare.activation_checkpointing import blocks
from lorasmith.types import Denoiser


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
