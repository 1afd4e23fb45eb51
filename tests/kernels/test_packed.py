"""Packed layers against the plain ones that they are made of."""

import pytest
import torch
from torch import nn

from lorasmith.adapters.layer import Layer
from lorasmith.kernels.packed import PackedConv2d, PackedLinear

CONVS = [
    nn.Conv2d(8, 12, 3, padding=1),
    nn.Conv2d(8, 12, 3, stride=2, padding=1),
    nn.Conv2d(8, 12, 1, bias=False),
    nn.Conv2d(8, 12, 3, dilation=2, groups=4),
    nn.Conv2d(8, 8, 3, padding=1, groups=8),
    nn.Conv2d(8, 16, 5, padding=4, dilation=2, groups=2),
    nn.Conv2d(8, 16, 3, padding=3, groups=2),
    nn.Conv2d(8, 16, (3, 1), padding=(1, 0)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [*CONVS, nn.Linear(24, 40), nn.Linear(24, 40, bias=False)], ids=str)
def test_packed_layers_give_the_same(layer: nn.Module, dtype: torch.dtype) -> None:
    plain = layer.to(dtype).requires_grad_(False)
    if isinstance(plain, nn.Conv2d):
        conv = Layer.of("layer", plain).conv
        assert conv is not None
        packed, shape = PackedConv2d(plain, conv), (2, 8, 11, 13)
    else:
        assert isinstance(plain, nn.Linear)
        packed, shape = PackedLinear(plain), (2, 5, 24)
    assert torch.equal(packed.weight, plain.weight)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y, other = plain(x), packed(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(other, y, rtol=bound, atol=bound)
    grads = [torch.autograd.grad(out, x, grad)[0] for out in (y, other)]
    torch.testing.assert_close(grads[1], grads[0], rtol=bound, atol=bound)
