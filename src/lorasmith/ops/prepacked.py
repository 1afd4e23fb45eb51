"""Frozen layers whose weight lies in oneDNN's own blocks, made once instead of at every call, for both passes.

The gradient of a product's input is a product with the transposed weight; that of a convolution is a transposed
convolution (Dumoulin and Visin 2016, "A guide to convolution arithmetic", section 4). Nothing is kept for the backward
pass. g groups, k… the kernel's axes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasmith.ops.additive import Base

SIDE = 32  # of a typical gradient: without one, oneDNN lays weights out for no size at all


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
    """A frozen layer with a weight in blocks, one set for each pass; an adapter may run inside its function."""

    adapter: Callable[[Tensor, "Packed"], Tensor] | None = None
    bias: Tensor | None
    blocks: Tensor
    blocks_back: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    @property
    def num_bytes(self) -> int:
        """What the blocks take."""
        return sum(torch.ops.mkldnn._nbytes(blocks) for blocks in (self.blocks, self.blocks_back))

    def both_blocks(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A plain weight -> the blocks of the forward and of the backward pass."""
        ...

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

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight [n_out, n_in], made anew."""
        return self.blocks.to_dense()

    def both_blocks(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _blocks_of(weight), _blocks_of(weight.t())

    def product(self, x: Tensor) -> Tensor:
        return _product(x, self.blocks, self.bias)

    def row_products(self, rows: Tensor) -> Tensor:
        return _product(rows.to(self.dtype), self.blocks, None)

    def arranged(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return _product(grad, self.blocks_back, None)


class PackedPointwise(Packed, nn.Conv2d):
    """x [B, n_in, h, w] -> [B, n_out, h, w], channels last: a convolution that is a linear layer over the channels.

    Blocks for convolutions of one pixel fit some sizes of x; for others oneDNN lays them out again in every call.
    """

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight [n_out, n_in, 1, 1], made anew."""
        return self.blocks.to_dense()[..., None, None]

    def both_blocks(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        matrix = weight.flatten(1)
        return _blocks_of(matrix), _blocks_of(matrix.t())

    def product(self, x: Tensor) -> Tensor:
        return _product(x.movedim(1, -1), self.blocks, self.bias).movedim(-1, 1)

    def row_products(self, rows: Tensor) -> Tensor:
        return _product(rows.to(self.dtype).flatten(1), self.blocks, None)

    def arranged(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return _product(grad.movedim(1, -1), self.blocks_back, None).movedim(-1, 1)


class PackedConv2d(Packed, nn.Conv2d):
    """x [B, n_in, h, w] -> [B, n_out, h', w'], channels last."""

    padding: tuple[int, int]  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight [n_out, n_in / g, k, k], made anew."""
        return self.blocks.to_dense()

    def both_blocks(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        size = [1, self.out_channels, SIDE, SIDE]
        return (
            torch.ops.mkldnn._reorder_convolution_weight(
                weight, self.padding, self.stride, self.dilation, self.groups, None
            ),
            torch.ops.mkldnn._reorder_convolution_transpose_weight(
                weight, self.padding, (0, 0), self.stride, self.dilation, self.groups, size
            ),
        )

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.blocks, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    def row_products(self, rows: Tensor) -> Tensor:
        side_by_side = rows.to(self.dtype).permute(1, 2, 0, 3).flatten(2).repeat(self.groups, 1, 1)
        return torch.ops.mkldnn._convolution_pointwise(
            self.arranged(side_by_side[None]), self.blocks, None,
            (0, 0), (1, rows.shape[3]), (1, 1), self.groups, "none", [], "",
        )[0, :, 0].t()  # fmt: skip

    def arranged(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        sizes = zip(shape[2:], grad.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        unseen = [n + 2 * p - d * (k - 1) - 1 - (n_out - 1) * s for n, n_out, k, s, p, d in sizes]
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            grad, self.blocks_back, None, self.padding, unseen, self.stride, self.dilation, self.groups, "none", [], ""
        )


def packed(layer: nn.Module, kind: type[Packed]) -> Packed:
    """The layer itself, made one of this kind: it keeps its places, its hooks and its bias, and no plain weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    del layer.weight
    layer.__class__ = kind
    assert isinstance(layer, Packed)
    layer.blocks, layer.blocks_back = layer.both_blocks(weight.detach())
    return layer


def _blocks_of(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix, None)


def _product(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")
