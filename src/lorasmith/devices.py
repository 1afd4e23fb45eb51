"""Devices and dtypes: the one place that asks what the machine can do."""

import logging
from functools import cache

import torch
from torch import Tensor

from lorasmith.types import Denoiser, DtypeName, TrainingDtypeName

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def best_device() -> torch.device:
    """The first CUDA device, else Apple's GPU, else the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_of(denoiser: Denoiser) -> torch.device:
    """Where the denoiser's first net is."""
    return next(next(iter(denoiser.nets.values())).parameters()).device


def has_bf16(device: torch.device) -> bool:
    """Whether products in bf16 run natively there; elsewhere they are emulated, up to a hundred times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return False


def has_packed_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies there by weights that lie in its own blocks, natively in this dtype."""
    products = ("linear", "convolution", "convolution_transpose")
    needed = [name for kind in products for name in (f"_reorder_{kind}_weight", f"_{kind}_pointwise")]
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in needed)
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16(device)))
    )


@cache
def has_int8(device: torch.device) -> bool:
    """Whether products of int8 numbers come out right there: processors without VNNI cut sums off on the way."""
    most = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    try:
        return bool((torch._int_mm(most, most.t().contiguous()) == 64 * 127 * 127).all())
    except (RuntimeError, NotImplementedError):  # devices without such products
        return False


def model_dtype(name: TrainingDtypeName, device: torch.device) -> torch.dtype | None:
    """The dtype that a model is copied to: None leaves it in its own."""
    return None if name == "none" else compute_dtype(name, device)


@cache  # so that the fallback is said once
def compute_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype to compute in when `name` was asked for: fp32 where the device has no bf16."""
    if name == "bf16" and not has_bf16(device):
        log.info("%s has no bf16: computing in fp32 instead", device.type)
        return torch.float32
    return DTYPES[name]


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the processor: Apple's GPUs have no such numbers."""
    return tensor.cpu().double()
