"""Updates whose weights are built from factors, and what holds of updates whatever they multiply by."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.ops.additive import Weights, updated
from lorasmith.ops.dense import DenseLinear
from lorasmith.ops.low_rank import LowRankLinear


def products(a: Tensor, b: Tensor, c: Tensor) -> Weights:
    """One weight built from three factors, one of them used twice, and one used as it is."""
    return a @ b * a.sum(), c


def test_gradients_reach_the_factors_of_built_weights(random: Any) -> None:
    x, y, factors = random(2, 3, 6), random(2, 3, 4), (random(3, 2), random(2, 6), random(4, 3))
    adapted = updated(x, y, LowRankLinear(), factors, 0.7, products)
    down, up = products(*factors)
    torch.testing.assert_close(adapted, y + 0.7 * (x @ down.T @ up.T))
    assert torch.autograd.gradcheck(
        lambda x, y, *factors: updated(x, y, LowRankLinear(), factors, 0.7, products), (x, y, *factors), fast_mode=True
    )


def test_built_weights_are_not_kept_for_the_backward_pass(random: Any) -> None:
    x, y, factors = random(3, 6), random(3, 4), (random(4, 2), random(2, 6))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        updated(x, y, DenseLinear(), factors, 1.0, lambda a, b: (a @ b,))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *factors)}


def test_inputs_stay_and_those_without_a_gradient_get_none(random: Any) -> None:
    x, y, weight = random(3, 6).detach(), random(3, 4).detach(), random(4, 6)
    before = x.clone(), y.clone()
    updated(x, y, DenseLinear(), (weight,), 1.0).sum().backward()
    assert x.grad is None and y.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 6))
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_weight_is_the_exact_identity(random: Any, layers: torch.dtype, ours: torch.dtype) -> None:
    x, y = random(3, 6).to(layers), random(3, 4).to(layers)
    adapted = updated(x, y, DenseLinear(), (torch.zeros(4, 6, dtype=ours),), 1.0)
    assert adapted.dtype == layers and torch.equal(adapted, y)


def test_a_gradient_that_is_one_number_repeated_in_memory(random: Any) -> None:
    """The gradient of a sum has strides of 0."""
    x, y, down, up = random(2, 3, 6), random(2, 3, 4), random(2, 6), random(4, 2)
    fused = torch.autograd.grad(updated(x, y, LowRankLinear(), (down, up), 0.7).sum(), (x, y, down, up))
    plain = torch.autograd.grad((y + 0.7 * (x @ down.T @ up.T)).sum(), (x, y, down, up))
    torch.testing.assert_close(fused, plain)


def test_an_activation_may_change_the_output_in_place(random: Any) -> None:
    x, y, weight = random(3, 6), random(3, 4), random(4, 6)
    out = torch.relu_(updated(x, y, DenseLinear(), (weight,), 1.0))
    torch.testing.assert_close(out, torch.relu(y + x @ weight.T))
    out.sum().backward()
    assert weight.grad is not None and weight.grad.any()
