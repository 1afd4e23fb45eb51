"""Packed layers against the plain ones that they are made of."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.ops.prepacked import Packed, PackedConv2d, PackedLinear, PackedPointwise, packed

CONVS = [
    nn.Conv2d(8, 12, 3, padding=1),
    nn.Conv2d(8, 12, 3, stride=2, padding=1),
    nn.Conv2d(8, 12, 1, bias=False),
    nn.Conv2d(8, 12, 3, dilation=2, groups=4),
    nn.Conv2d(8, 8, 3, padding=1, groups=8),
    nn.Conv2d(8, 16, 5, padding=4, dilation=2, groups=2),
    nn.Conv2d(8, 16, 3, padding=3, groups=2),
    nn.Conv2d(8, 16, (3, 1), padding=(1, 0)),
    nn.Conv2d(8, 16, 1, stride=2),
    nn.Conv2d(8, 16, 4, stride=(2, 3), padding=1, dilation=(1, 2)),
]


def kind_of(layer: nn.Module) -> type[Packed]:
    if isinstance(layer, nn.Linear):
        return PackedLinear
    return PackedPointwise if layer.kernel_size == (1, 1) and layer.stride == (1, 1) else PackedConv2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 11, 13), (1, 12, 9), (3, 5, 5)], ids=str)
@pytest.mark.parametrize("layer", [*CONVS, nn.Linear(24, 40), nn.Linear(24, 40, bias=False)], ids=str)
def test_packed_layers_give_the_same(layer: Any, size: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = layer.to(dtype).requires_grad_(False)
    layer = packed(copy.deepcopy(plain), kind_of(plain))
    assert torch.equal(layer.weight, plain.weight)
    assert {name for name, _ in layer.named_parameters()} <= {"bias"} and layer.num_bytes > 0
    batch, *sides = size
    shape = (*size, 24) if isinstance(plain, nn.Linear) else (batch, 8, *sides)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    y, other = plain(x), layer(x)
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(other, y, rtol=bound, atol=bound)
    grads = [torch.autograd.grad(out, x, grad)[0] for out in (y, other)]
    torch.testing.assert_close(grads[1], grads[0], rtol=bound, atol=bound)
    rows = torch.randn((3, *plain.weight.shape[1:]), generator=generator).to(dtype)
    expected = rows.flatten(1) @ plain.weight.flatten(1).t()
    torch.testing.assert_close(layer.row_products(rows), expected, rtol=bound, atol=bound)
