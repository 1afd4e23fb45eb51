"""Base weights that are shared out: each process holds its part, and a block's are whole while the block runs."""

import torch
import torch.distributed as dist
from torch import nn

from lorasmith.prepare.activation_checkpointing import INNERMOST, blocks
from lorasmith.types import Denoiser, Routed


def shard(denoiser: Denoiser, device: torch.device) -> None:
    """Leaves each process its share of the weights; a block's are gathered while it runs (FSDP2, fully_shard).

    As in ZeRO (Rajbhandari et al. 2020, section 5.3). The process group must be up; from then on all processes must run
    the denoiser the same number of times. At most one innermost block is whole at a time, with what is left of the
    blocks around it and a buffer for its neighbour; the blocks that one checkpoint runs again stay whole together.
    Losses are bitwise those of whole weights, gradients up to the order of sums: what goes back to a block's input is
    added up within the block first. ValueError where no net has blocks, or where nets rest while others run.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # half a second that other runs need not wait

    if not any(blocks(net, 1) for net in denoiser.nets.values()):
        raise ValueError("sharded must be False: the model has no lists of blocks")
    if isinstance(denoiser, Routed):  # a net that rests in one process would be waited for in the others
        raise ValueError("sharded must be False: the model sends each sample to one of its nets alone")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for net in denoiser.nets.values():
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                # fully_shard refuses channels_last, and what two blocks share
                setattr(module, name, nn.Parameter(parameter.detach().contiguous(), False))
        for module in (*_blocks_from_within(net), net):
            sharded = fully_shard(module, mesh=mesh)
            # The first gathering makes the buffers of all later ones: if it were in inference mode, none could train.
            sharded.unshard()
            sharded.reshard()


def _blocks_from_within(net: nn.Module) -> list[nn.Module]:
    """The blocks of every depth, each after those in it: one of SDXL's outermost holds half of the weights."""
    return list(dict.fromkeys(block for depth in range(INNERMOST, 0, -1) for block in blocks(net, depth)))
