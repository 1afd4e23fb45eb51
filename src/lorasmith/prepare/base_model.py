"""The base model that adapters train on: a frozen copy in the dtype, on the device and in the form asked for."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from lorasmith.config.schema import Config
from lorasmith.devices import device_of, model_dtype
from lorasmith.prepare.fsdp import shard
from lorasmith.prepare.int8_backward import quantize_backward
from lorasmith.prepare.offload import offload
from lorasmith.prepare.prepack import pack
from lorasmith.prepare.quantize import low_bit_copy
from lorasmith.prepare.share import num_bytes, shared_copy
from lorasmith.reporting.progress import SILENT, Progress, megabytes
from lorasmith.types import Denoiser


@dataclass(frozen=True)
class BaseModel:
    """A frozen copy of a denoiser, made ready."""

    denoiser: Denoiser
    is_fp16: bool  # so that losses must be scaled
    num_prepacked: int  # layers


def prepare(
    denoiser: Denoiser, config: Config, device: torch.device, *, offsets: Collection[str] = (),
    progress: Progress = SILENT,
) -> BaseModel:  # fmt: skip
    """A copy to train on; the one that came in is never touched.

    offsets: paths of parameters that adapters change. ValueError where the copy cannot be made as asked.
    """
    home = device_of(denoiser) if config.offloading or config.sharded else device
    dtype = model_dtype(config.training_dtype, device)
    with megabytes("preparing the weights", num_bytes(denoiser), progress) as advance:
        if config.base_dtype == "none":
            copy = shared_copy(denoiser, home, dtype, advance=advance)
        else:
            copy = low_bit_copy(denoiser, config.base_dtype, home, dtype, advance)
    if config.quantized_backward:
        quantize_backward(copy, device)
    if config.offloading:  # after quantize_backward, which changes the forward passes that this wraps
        offload(copy, device)
    is_fp16 = any(p.dtype == torch.float16 for net in copy.nets.values() for p in net.parameters())
    if config.sharded:
        shard(copy, device)
    return BaseModel(copy, is_fp16, pack(copy, config.pack, offsets, progress))
