"""Sizes read from layers, and convolutions whose padding is given by name."""

from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.base import ADAPTABLE, Layer


def test_sizes() -> None:
    assert Layer.of("layer", nn.Linear(6, 10)) == Layer(6, 10)
    sizes = Layer.of("layer", nn.Conv2d(6, 10, (3, 1), stride=2, padding=(1, 0), dilation=(1, 2), groups=2))
    assert sizes.weight_shape == (10, 3, 3, 1) and sizes.fan_in == 9 and sizes.groups == 2
    assert sizes.conv is not None and sizes.conv.num_axes == 2
    assert (sizes.conv.stride, sizes.conv.padding, sizes.conv.dilation) == ((2, 2), (1, 0), (1, 2))


def test_every_adaptable_kind_has_sizes() -> None:
    for kind in ADAPTABLE:
        make: Any = kind
        module = make(6, 10) if kind is nn.Linear else make(6, 10, 3)
        assert Layer.of("layer", module).weight_shape == tuple(module.weight.shape)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 5), 2), ((2, 3), 2), ((1, 1), 1)])
def test_padding_by_name(sample_of: Any, filled: Any, padding: str, kernel: Any, dilation: int) -> None:
    sample = sample_of(nn.Conv2d(6, 10, kernel, padding=padding, dilation=dilation), torch.randn(1, 6, 9, 9))
    adapter = filled(LoRA(rank=4).build(sample.sizes, "layer", 0))
    merged = sample.module.weight + (adapter.up.flatten(1) @ adapter.down.flatten(1)).view(10, 6, *kernel)
    torch.testing.assert_close(sample.adapted(adapter), sample.run(sample.x, merged), rtol=1e-4, atol=1e-4)


def test_padding_that_differs_by_side_or_is_not_of_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mid.conv: padding 'same' must be even to be adapted, got a kernel of \(2"):
        Layer.of("mid.conv", nn.Conv2d(6, 10, 2, padding="same"))
    with pytest.raises(ValueError, match="mid.conv: convolutions must pad with zeros to be adapted, got 'circular'"):
        Layer.of("mid.conv", nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
