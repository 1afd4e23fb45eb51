"""What LoHa has of its own: two ways to the same product, LyCORIS's start."""

from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.adapters.algorithms import LoHa
from lorasmith.adapters.base import Layer
from lorasmith.ops.dense import DenseConv, DenseLinear
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear

WAYS = [
    (nn.Linear(24, 30), 3, LowRankLinear),
    (nn.Linear(24, 30), 4, DenseLinear),
    (nn.Conv2d(24, 30, 3), 4, LowRankConv),
    (nn.Conv2d(24, 30, 3), 6, DenseConv),
]


@pytest.mark.parametrize(("module", "rank", "kind"), WAYS, ids=str)
def test_the_way_with_fewer_numbers_is_taken(module: Any, rank: int, kind: type) -> None:
    adapter = LoHa(rank=rank).build(Layer.of("layer", module), "layer", 0)
    assert type(adapter.operation) is kind


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("rank", [3, 4])
def test_both_ways_are_fedparas_equation(filled: Any, rank: int, alpha: float | None) -> None:
    adapter = filled(LoHa(rank=rank, alpha=alpha).build(Layer(24, 30), "layer", 0))
    w1_a, w1_b, w2_a, w2_b = adapter.factors
    delta = (w1_a @ w1_b) * (w2_a @ w2_b) * (1 if alpha is None else alpha / rank)
    x, y = torch.randn(3, 24), torch.randn(3, 30)
    torch.testing.assert_close(adapter(x, y), y + x @ delta.T, rtol=1e-4, atol=1e-4)


def test_the_start_has_lycoriss_deviations() -> None:
    adapter = LoHa(rank=64).build(Layer(512, 512), "layer", 0)
    w1_a, w1_b, w2_a, w2_b = (factor.detach() for factor in adapter.factors)
    assert float(w1_a.std()) == pytest.approx(0.1, rel=0.02)
    assert float(w1_b.std()) == pytest.approx(1, rel=0.02)
    assert not w2_a.any()
    assert float(w2_b.std()) == pytest.approx(1, rel=0.02)
    assert all(abs(float(w.mean())) < 0.03 * float(w.std()) for w in (w1_a, w1_b, w2_b))
