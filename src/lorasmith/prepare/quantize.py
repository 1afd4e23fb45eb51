"""Base weights in 8 or 4 bits: linear layers that make a whole weight for each product, and keep none.

n_in and n_out are the sizes of a linear layer.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.errors import needs_extra
from lorasmith.prepare.activation_checkpointing import blocks
from lorasmith.prepare.share import D, shared_copy
from lorasmith.reporting.progress import Advance, unwatched
from lorasmith.types import Denoiser

log = logging.getLogger(__name__)

NF4_BLOCK = 64  # numbers that share a scale (Dettmers et al. 2023, section 3)
LEAST = 1e-12  # a row's largest number counts as no less in fp8
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
FARTHEST = 0.16  # of numbers in -1 to 1 from what comes back; nf4's widest gap is 0.304 wide, so 0.152


@dataclass(frozen=True)
class Stored:
    """What is kept of a weight, and how it is made whole: [n_out, n_in] in the dtype it had."""

    kept: tuple[Tensor, ...]
    whole: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept)


def _int8(weight: Tensor) -> Stored:
    """Each row divided by its largest number over 127.5, rounded; one scale a row.

    From float32, as the quotients of bf16 numbers would be rounded twice.
    """
    try:
        from torchao.quantization import Int8Tensor, PerRow  # pyright: ignore[reportMissingImports]
    except ImportError:  # an older torchao has the module without the class
        raise needs_extra("base_dtype int8", "quantized") from None
    packed = Int8Tensor.from_hp(weight.float(), granularity=PerRow())
    assert packed.zero_point is not None
    return Stored((packed.qdata, packed.scale, packed.zero_point), partial(packed.dequantize, weight.dtype))


def _fp8(weight: Tensor) -> Stored:
    """Each row divided by its largest number over 448, as float8 (e4m3); one scale a row.

    From float32, as for int8; the least scale keeps rows of zeros from becoming NaN.
    """
    try:
        from torchao.quantization import Float8Tensor, PerRow  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise needs_extra("base_dtype fp8", "quantized") from None
    packed = Float8Tensor.from_hp(weight.float(), granularity=PerRow(), hp_value_lb=LEAST)
    return Stored((packed.qdata, packed.scale), partial(packed.dequantize, weight.dtype))


def _nf4(weight: Tensor) -> Stored:
    """Each block of 64 numbers divided by its largest, as the nearest of 16 quantiles of the normal distribution.

    The blocks are handed over as rows: bitsandbytes 0.50.2 gives wrong numbers for rows of 96 on processors with
    AVX-512, and compiles a function for rows of odd lengths.
    """
    try:
        import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise needs_extra("base_dtype nf4", "nf4") from None
    kept, state = bnb.quantize_4bit(weight.reshape(-1, NF4_BLOCK), blocksize=NF4_BLOCK, quant_type="nf4")
    shape = weight.shape
    return Stored((kept, state.absmax), lambda: bnb.dequantize_4bit(kept, state).view(shape))


PACKINGS: dict[str, Callable[[Tensor], Stored]] = {"int8": _int8, "fp8": _fp8, "nf4": _nf4}


class LowBitLinear(nn.Linear):
    """A frozen linear layer whose weight is made whole for each product, forward and backward, and when it is read."""

    packed: Stored

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.packed.whole()

    def forward(self, input: Tensor) -> Tensor:
        """input [..., n_in] -> [..., n_out]."""
        return _Product.apply(input, self.packed.whole, self.bias)


class _Product(torch.autograd.Function):
    """x W^T + b; the whole W is made again for the backward pass, which else would hold every layer's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.whole = whole
        return F.linear(x, whole(), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return grad_y @ ctx.whole(), None, None


def low_bit_copy(
    denoiser: D, kind: str, device: torch.device, dtype: torch.dtype | None, advance: Advance = unwatched
) -> D:
    """A copy as `shared_copy` makes it, the linear layers of whose blocks keep their weights as `kind` says.

    What is outside the blocks (the first and last layers, those of times and conditioning) stays whole, as do
    convolutions. A weight is packed before the next is copied, so no second set of weights is held on the way.
    advance: told the bytes of each parameter. ValueError where that cannot be.
    """
    paths = {path for path, _ in _packable(shared_copy(denoiser))}  # a copy's layers may differ from the original's
    if not paths:
        raise ValueError("base_dtype must be none: the model has no torch.nn.Linear in lists of blocks")
    twin = shared_copy(denoiser, device, dtype, but={f"{path}.weight" for path in paths}, advance=advance)
    layers = dict(_packable(twin))
    for path, layer in layers.items():
        if (dtype or layer.weight.dtype) not in COMPUTED:
            raise ValueError(
                f"base_dtype must be none here: {path}.weight is {layer.weight.dtype}, not fp32, bf16 or fp16"
            )
    for each in {dtype or layer.weight.dtype for layer in layers.values()}:
        refuse_without_kernels(kind, device, each)
    bytes_before = bytes_after = 0
    for path, layer in layers.items():
        before, weight = layer.weight.nbytes, layer.weight.detach().to(device, dtype)
        if not weight.isfinite().all():
            raise ValueError(f"{path}.weight must be finite for base_dtype {kind}, got NaN or infinity")
        bytes_before += weight.nbytes
        packed = PACKINGS[kind](weight)
        bytes_after += packed.nbytes
        del layer.weight
        layer.__class__ = LowBitLinear  # as torch's parametrize does: the layer keeps its places and hooks
        layer.packed = packed  # pyright: ignore[reportArgumentType]
        advance(before)
    _tell(twin, kind, bytes_before, bytes_after)
    return twin


def _packable(denoiser: Denoiser) -> Iterator[tuple[str, nn.Linear]]:
    """(path, layer) of the blocks' linear layers; not those with a forward of their own, or of odd sizes."""
    for name, net in denoiser.nets.items():
        inside = {id(layer) for block in blocks(net, 1) for layer in block.modules()}
        for path, layer in net.named_modules(prefix=name):
            if id(layer) in inside and type(layer) is nn.Linear and layer.in_features > 1:
                if layer.weight.numel() % NF4_BLOCK == 0:
                    yield path, layer


def refuse_without_kernels(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError where the library, this torch or the device cannot pack numbers, or gives back others."""
    numbers = torch.linspace(-1, 1, NF4_BLOCK**2, device=device, dtype=dtype).view(NF4_BLOCK, NF4_BLOCK)
    try:
        found = PACKINGS[kind](numbers).whole()
    except (RuntimeError, TypeError, AttributeError) as error:  # of kernels or dtypes that are not there
        reason = str(error).partition("\n")[0]
        raise ValueError(f"base_dtype must not be {kind} on this {device.type} and torch: {reason}") from error
    if not (found - numbers).abs().max() < FARTHEST:
        raise ValueError(f"base_dtype must not be {kind} on this {device.type} and torch: numbers come back wrong")


def _tell(denoiser: Denoiser, kind: str, bytes_before: int, bytes_after: int) -> None:
    """One line: what was packed, and what stays."""
    modules = {id(module): module for net in denoiser.nets.values() for module in net.modules()}
    kernels = {
        id(m.weight): m.weight.nbytes for m in modules.values() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    plain = {id(p): p for net in denoiser.nets.values() for p in net.parameters()}
    others = sum(p.nbytes for key, p in plain.items() if key not in kernels)
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in plain.values()}))
    log.info(
        "base weights: %.1f MB in %s instead of %.1f MB; %.1f MB of convolutions and %.1f MB of others stay in %s",
        bytes_after / 1e6, kind, bytes_before / 1e6, sum(kernels.values()) / 1e6, others / 1e6, dtypes,
    )  # fmt: skip
