"""What LoKr has of its own: sizes of the factors, whole or decomposed, and an alpha that counts only then."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import LoKr
from lorasmith.adapters.base import Layer
from lorasmith.adapters.lokr import LoKrAdapter, factorized
from lorasmith.adapters.registry import adapter_from_file
from lorasmith.ops.dense import DenseConv
from lorasmith.ops.kronecker import Kronecker
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear


def shapes(adapter: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(factor.shape) for name, factor in zip(adapter.names, adapter.factors, strict=True)}


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (360, None, (18, 20)),
        (360, 8, (8, 45)),
        (250, 16, (10, 25)),
        (250, 4, (2, 125)),
        (127, 8, (1, 127)),
        (64, 32, (2, 32)),
        (64, 24, (8, 8)),
        (1, None, (1, 1)),
        (1, 7, (1, 1)),
    ],
)
def test_sizes_are_factorized(size: int, factor: int | None, expected: tuple[int, int]) -> None:
    assert factorized(size, factor) == expected


@pytest.mark.parametrize(
    ("module", "algorithm", "expected"),
    [
        (nn.Linear(24, 30), LoKr(rank=2), {"lokr_w1": (5, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)}),
        (nn.Linear(24, 30), LoKr(rank=3), {"lokr_w1": (5, 4), "lokr_w2": (6, 6)}),
        (nn.Linear(24, 30), LoKr(rank=2, factor=1), {"lokr_w1": (1, 1), "lokr_w2_a": (30, 2), "lokr_w2_b": (2, 24)}),
        (nn.Linear(24, 30), LoKr(rank=2, factor=4), {"lokr_w1": (3, 4), "lokr_w2_a": (10, 2), "lokr_w2_b": (2, 6)}),
        (nn.Conv2d(24, 30, 3), LoKr(rank=2), {"lokr_w1": (5, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 54)}),
        (nn.Conv2d(24, 30, 3), LoKr(rank=3), {"lokr_w1": (5, 4), "lokr_w2": (6, 6, 3, 3)}),
        (nn.Conv2d(24, 30, 3), LoKr(rank=8), {"lokr_w1": (5, 4), "lokr_w2": (6, 6, 3, 3)}),
        (nn.Conv1d(24, 30, 3, groups=2), LoKr(rank=1), {"lokr_w1": (5, 3), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 12)}),
    ],
    ids=str,
)
def test_shapes_of_the_factors(module: Any, algorithm: LoKr, expected: dict[str, tuple[int, ...]]) -> None:
    assert shapes(algorithm.build(Layer.of("layer", module), "layer", 0)) == expected


def test_w2_is_decomposed_only_where_that_makes_it_smaller() -> None:
    """LyCORIS would here: the rank is below half of the longer side. Its reader takes w2 whole as well."""
    layer = Layer(4, 4096)
    adapter = LoKr(rank=8).build(layer, "layer", 0)
    assert shapes(adapter) == {"lokr_w1": (64, 2), "lokr_w2": (64, 2)}


WAYS = [
    (nn.Linear(24, 30), LoKr(rank=2), Kronecker),
    (nn.Linear(24, 30), LoKr(rank=2, factor=1), LowRankLinear),
    (nn.Linear(24, 30), LoKr(rank=64, factor=1), Kronecker),
    (nn.Conv2d(24, 30, 3), LoKr(rank=2), Kronecker),
    (nn.Conv2d(24, 30, 3), LoKr(rank=64), Kronecker),
    (nn.Conv2d(24, 30, 3), LoKr(rank=2, factor=1), LowRankConv),
    (nn.Conv2d(24, 30, 3, groups=2), LoKr(rank=2, factor=1), LowRankConv),
    (nn.Conv2d(24, 30, 3, groups=2), LoKr(rank=2), DenseConv),
]


@pytest.mark.parametrize(("module", "algorithm", "kind"), WAYS, ids=str)
def test_the_way_is_the_structures(module: Any, algorithm: LoKr, kind: type) -> None:
    assert type(algorithm.build(Layer.of("layer", module), "layer", 0).operation) is kind


def adapted(adapter: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return adapter(torch.randn(3, 24, generator=generator), torch.zeros(3, 30), None)


def test_alpha_counts_only_beside_a_decomposed_factor(filled: Any) -> None:
    whole, other = (filled(LoKr(rank=16, alpha=alpha).build(Layer(24, 30), "layer", 0)) for alpha in (2.0, 5.0))
    assert whole.alpha is None and whole.rank is None
    assert torch.equal(adapted(whole), adapted(other))
    parted, other = (filled(LoKr(rank=2, alpha=alpha).build(Layer(24, 30), "layer", 0)) for alpha in (2.0, 5.0))
    assert (parted.alpha, other.alpha, parted.rank) == (2, 5, 2)
    torch.testing.assert_close(2.5 * adapted(parted), adapted(other))


def test_w2_b_may_be_stored_in_the_kernels_shape() -> None:
    """As LyCORIS's functional interface makes it."""
    conv: Any = nn.Conv2d(24, 30, 3)
    layer = Layer.of("layer", conv)
    tensors = {"lokr_w1": torch.randn(5, 4), "lokr_w2_a": torch.randn(6, 2), "lokr_w2_b": torch.randn(2, 6, 3, 3)}
    flat = {**tensors, "lokr_w2_b": tensors["lokr_w2_b"].flatten(1)}
    x, y = torch.randn(1, 24, 4, 4), torch.randn(1, 30, 2, 2)
    one, other = (adapter_from_file(layer, stored)(x, y, None) for stored in (tensors, flat))
    assert torch.equal(one, other)


def test_any_factorization_is_read(sample_of: Any) -> None:
    """Also one that no factor of ours makes; w1 may be the larger half."""
    sample = sample_of(nn.Linear(24, 30), torch.randn(3, 24))
    for a, b in ((30, 24), (1, 24), (30, 1), (15, 2), (2, 12)):
        w1, w2 = torch.randn(a, b), torch.randn(30 // a, 24 // b)
        adapter = LoKrAdapter.from_file(sample.sizes, {"lokr_w1": w1, "lokr_w2": w2})
        expected = sample.run(sample.x, sample.module.weight + torch.kron(w1, w2))
        torch.testing.assert_close(sample.adapted(adapter), expected, rtol=1e-4, atol=1e-4)


def test_the_start_is_kaimings() -> None:
    adapter = LoKr(rank=64).build(Layer(120 * 256, 100 * 200), "layer", 0)
    w1, w2_a, w2_b = (factor.detach() for factor in adapter.factors)
    for factor in (w1, w2_a):
        bound = 1 / math.sqrt(factor.shape[1])
        assert 0.98 * bound < float(factor.abs().max()) <= bound
        assert float(factor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not w2_b.any()
