"""Adapters of random layers: the identity when new, and given back by their files; factors of random sizes."""

import math
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lycoris.functional import factorization
from torch import nn

from lorasmith.adapters.algorithms import OFT, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.base import Layer
from lorasmith.adapters.lokr import factorized
from lorasmith.adapters.registry import adapter_from_file

ALGORITHMS = st.one_of(
    st.builds(LoRA, rank=st.integers(1, 16)),
    st.builds(LoHa, rank=st.integers(1, 16)),
    st.builds(LoKr, rank=st.integers(1, 16), factor=st.none() | st.integers(1, 50)),
    st.builds(DoRA, rank=st.integers(1, 16)),
    st.builds(OFT, rank=st.integers(1, 16), alpha=st.none() | st.floats(1e-4, 10)),
)


@st.composite
def layers(draw: st.DrawFn) -> Any:
    """A linear layer, or a convolution of one to three axes, perhaps with groups."""
    n_in, n_out = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kernel = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    if not kernel:
        return nn.Linear(n_in, n_out, bias=draw(st.booleans()))
    common = math.gcd(n_in, n_out)
    groups = draw(st.sampled_from([divisor for divisor in range(1, common + 1) if common % divisor == 0]))
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    stride = draw(st.integers(1, 2))
    return kind(n_in, n_out, kernel, stride=stride, padding=draw(st.integers(0, 1)), groups=groups)


@settings(max_examples=120, deadline=None)
@given(layers(), ALGORITHMS)
def test_random_layers(layer: Any, algorithm: Any) -> None:
    sizes = Layer.of("layer", layer)
    try:
        adapter = algorithm.build(sizes, "layer", 0, layer)
    except ValueError:
        assume(not isinstance(algorithm, OFT))  # single outputs, or blocks across groups
        raise
    axes = len(sizes.kernel)
    x = torch.randn(2, sizes.n_in, *(3, 4, 3)[:axes])
    y = layer(x)
    assert torch.equal(adapter(x, y, layer.bias, layer), y)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    adapted = adapter(x, y, layer.bias, layer)
    assert adapted.shape == y.shape and adapted.dtype == y.dtype
    adapted.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in adapter.parameters())
    tensors = adapter.file_tensors(torch.float32)
    back = adapter_from_file(sizes, tensors, layer)
    again = back.file_tensors(torch.float32)
    assert list(again) == list(tensors) and all(torch.equal(again[name], tensors[name]) for name in tensors)
    torch.testing.assert_close(back(x, y, layer.bias, layer), adapted, rtol=1e-3, atol=1e-3)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.none() | st.integers(1, 200))
def test_sizes_are_factorized_as_lycoris_does(size: int, factor: int | None) -> None:
    assert factorized(size, factor) == factorization(size, -1 if factor is None else factor)
