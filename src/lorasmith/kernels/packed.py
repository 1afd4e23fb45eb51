"""Frozen layers whose weight lies in oneDNN's own blocks, made once instead of at every call, for both passes.

The gradient of a product's input is a product with the transposed weight; that of a convolution of stride 1 is a
convolution with the weight's axes swapped and its kernel flipped (Dumoulin and Visin 2016, "A guide to convolution
arithmetic", section 4). Nothing is kept for the backward pass. g groups, k… the kernel's axes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.kernels.convolution import ConvShape, flipped
from lorasmith.kernels.update import Base


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Base) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(layer.arranged(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(ctx.layer.arranged(grad), ctx.shape), None


class Packed(nn.Module, Base):
    """A frozen layer with a weight in blocks; an adapter may run inside its function."""

    adapter: Callable[[Tensor, "Packed"], Tensor] | None = None
    bias: Tensor | None
    blocks: Tensor
    blocks_back: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    @property
    def num_bytes(self) -> int:
        """What the blocks take."""
        both = (self.blocks, self.blocks_back)
        return sum(torch.ops.mkldnn._nbytes(blocks) for blocks in both if blocks is not None)

    def row_products(self, rows: Tensor) -> Tensor:
        """rows [r, n_in] or [r, n_in / g, k, k] -> their products with each of the weight's rows [r, n_out]."""
        ...

    def forward(self, input: Tensor) -> Tensor:
        if self.adapter is None:
            return _Frozen.apply(input, self)  # pyright: ignore[reportReturnType]
        return self.adapter(input, self)

    def take(self, adapter: Callable[[Tensor, "Packed"], Tensor]) -> "Taken":
        """Hangs in an adapter, (x, this layer) -> the adapted output; returns what takes it out again."""
        if self.adapter is not None:
            raise ValueError("a packed layer must have one adapter at most, got another")
        self.adapter = adapter
        return Taken(self)


class Taken:
    """An adapter that hangs in a packed layer."""

    def __init__(self, layer: Packed) -> None:
        self.layer = layer

    def remove(self) -> None:
        self.layer.adapter = None


class PackedLinear(Packed, nn.Linear):
    """x [..., n_in] -> x W^T + bias [..., n_out]."""

    def __init__(self, layer: nn.Linear) -> None:
        """A layer with the weight of this one, and its bias itself."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        weight = layer.weight.detach()
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.blocks_back = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), None)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight [n_out, n_in], made anew."""
        return self.blocks.to_dense()

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")

    def row_products(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows.to(self.dtype), self.blocks, None, "none", [], "")

    def arranged(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(grad, self.blocks_back, None, "none", [], "")


class PackedConv2d(Packed, nn.Conv2d):
    """x [B, n_in, h, w] -> [B, n_out, h', w'], channels last."""

    def __init__(self, layer: nn.Conv2d, shape: ConvShape) -> None:
        """A layer with the weight of this one, and its bias itself."""
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(layer, name))
        self.bias, self.shape, self.back = layer.bias, shape, shape.mirrored(layer.kernel_size)
        self.padding_mode, self.output_padding, self.transposed = "zeros", (0, 0), False
        weight = layer.weight.detach()
        self.blocks = _blocks_of(weight, shape)
        self.blocks_back = None if self.back is None else _blocks_of(flipped(weight, shape.groups), self.back)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight [n_out, n_in / g, k, k], made anew."""
        return self.blocks.to_dense()

    def product(self, x: Tensor) -> Tensor:
        return _run(x, self.blocks, self.bias, self.shape)

    def row_products(self, rows: Tensor) -> Tensor:
        side_by_side = rows.to(self.dtype).permute(1, 2, 0, 3).flatten(2).repeat(self.groups, 1, 1)
        by_rows = ConvShape((1, rows.shape[3]), (0, 0), (1, 1), self.groups)
        return _run(self.arranged(side_by_side[None]), self.blocks, None, by_rows)[0, :, 0].t()

    def arranged(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        if self.back is None:
            x = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last)
            return self.shape.input_gradient(grad, x, self.weight, self.groups)
        return _run(grad, self.blocks_back, None, self.back)


def _blocks_of(weight: Tensor, shape: ConvShape) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(memory_format=torch.channels_last),
        shape.padding, shape.stride, shape.dilation, shape.groups, None,
    )  # fmt: skip


def _run(x: Tensor, blocks: Tensor | None, bias: Tensor | None, shape: ConvShape) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        x, blocks, bias, shape.padding, shape.stride, shape.dilation, shape.groups, "none", [], ""
    )
