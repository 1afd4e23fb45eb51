"""Gradients through linear layers as int8 products."""

from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.devices import has_int8
from lorasmith.errors import needs_extra
from lorasmith.types import Denoiser


def refuse_unfit_int8(device: torch.device) -> None:
    """ValueError where torchao has no int8 products for training, or the device gives wrong ones."""
    try:
        from torchao.prototype.quantized_training import (  # pyright: ignore[reportMissingImports]
            Int8MixedPrecisionTrainingConfig,  # noqa: F401
        )
    except ImportError:  # an older torchao has the module without the class
        raise needs_extra("quantized_backward", "quantized") from None
    if not has_int8(device):
        raise ValueError("quantized_backward must be False here: this processor's int8 products overflow (no VNNI)")


def quantize_backward(denoiser: Denoiser, device: torch.device) -> None:
    """The gradients of linear layers' inputs become int8 products, each row scaled by its largest number.

    By torchao's linear layer for mixed precision (a prototype there); weights and forward pass stay in their dtype.
    ValueError where that cannot be.
    """
    refuse_unfit_int8(device)
    from torchao.prototype.quantized_training import (  # pyright: ignore[reportMissingImports]
        Int8MixedPrecisionTrainingConfig,
    )
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

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
