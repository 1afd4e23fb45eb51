"""Losses against their closed forms, either side of where they change, and torch's."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from lorasmith.diffusion.losses import L1, MSE, Huber, Loss, SmoothL1, by_sample

PRED = torch.tensor([[0.0, 0.4], [3.0, -2.0]])
TARGET = torch.zeros(2, 2)
FORMULAS = {
    "MSE": [0.16 / 2, 13 / 2],
    "L1": [0.2, 2.5],
    "Huber": [0.08 / 2, (2.5 + 1.5) / 2],
    "SmoothL1": [0.08 / 2, (2.5 + 1.5) / 2],
}
WIDTHS = (1e-3, 0.5, 1.0, 2.0, 100.0)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    loss = TypeAdapter(Loss).validate_python(name)
    assert loss.name == name
    torch.testing.assert_close(by_sample(loss, PRED, TARGET), torch.tensor(FORMULAS[name]))
    assert by_sample(loss, PRED, TARGET).mean() == pytest.approx(
        float(getattr(torch.nn, f"{name}Loss")()(PRED, TARGET))
    )


def closed_form(loss: Any, d: float) -> float:
    """The loss of a difference d >= 0."""
    if isinstance(loss, MSE | L1):
        return d * d if isinstance(loss, MSE) else d
    if isinstance(loss, Huber):
        return d * d / 2 if d < loss.delta else loss.delta * (d - loss.delta / 2)
    return d * d / (2 * loss.beta) if d < loss.beta else d - loss.beta / 2


@pytest.mark.parametrize(
    "loss", [MSE(), L1(), *(Huber(delta=width) for width in WIDTHS), *(SmoothL1(beta=width) for width in WIDTHS)]
)
def test_values_and_slopes_either_side_of_the_width(loss: Any) -> None:
    """The slope of each of these is that of its closed form, so both are compared."""
    width = getattr(loss, "delta", getattr(loss, "beta", 1.0))
    for d in (0.0, width / 2, 0.999 * width, width, 1.001 * width, 10 * width):
        for sign in (1, -1):
            pred = torch.tensor([[3 + sign * d]], dtype=torch.float64, requires_grad=True)
            value = loss.elementwise(pred, torch.full((1, 1), 3.0, dtype=torch.float64))
            assert float(value.detach()) == pytest.approx(closed_form(loss, d), rel=1e-9, abs=1e-15)
            (slope,) = torch.autograd.grad(value.sum(), pred)
            if d > 0:
                step = 1e-6 * d
                around = [closed_form(loss, x) for x in (d - step, d + step)]
                assert float(slope) == pytest.approx(sign * (around[1] - around[0]) / (2 * step), rel=1e-3)


def test_huber_and_smooth_l1_differ_by_their_width() -> None:
    torch.testing.assert_close(
        Huber(delta=0.5).elementwise(PRED, TARGET), 0.5 * SmoothL1(beta=0.5).elementwise(PRED, TARGET)
    )


def test_half_precision_is_compared_in_float32() -> None:
    """In bf16 the square of 1 + 2^-7 would lose its last digits."""
    pred = torch.full((1, 4096), 1 + 2**-7, dtype=torch.bfloat16)
    found = by_sample(MSE(), pred, torch.zeros(1, 4096, dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and float(found) == (1 + 2**-7) ** 2


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.sampled_from(sorted(FORMULAS)))
def test_a_sample_s_loss_is_the_mean_over_its_elements_alone(shape: list[int], name: str) -> None:
    """Whatever its axes: pictures [B,C,h,w], clips [B,C,f,h,w]."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    pred, target = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    loss = TypeAdapter(Loss).validate_python(name)
    together: Tensor = by_sample(loss, pred, target)
    assert together.shape == (shape[0],)
    for i in range(shape[0]):
        differences = (pred[i] - target[i]).abs().flatten().tolist()
        expected = sum(closed_form(loss, d) for d in differences) / len(differences)
        assert float(together[i]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
