"""Losses against their formulas, written out, and torch's."""

import pytest
import torch
from pydantic import TypeAdapter

from lorasmith.losses import MSE, Huber, Loss, SmoothL1, by_sample

PRED = torch.tensor([[0.0, 0.4], [3.0, -2.0]])
TARGET = torch.zeros(2, 2)
FORMULAS = {
    "MSE": [0.16 / 2, 13 / 2],
    "L1": [0.2, 2.5],
    "Huber": [0.08 / 2, (2.5 + 1.5) / 2],
    "SmoothL1": [0.08 / 2, (2.5 + 1.5) / 2],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    loss = TypeAdapter(Loss).validate_python(name)
    assert loss.name == name
    torch.testing.assert_close(by_sample(loss, PRED, TARGET), torch.tensor(FORMULAS[name]))
    assert by_sample(loss, PRED, TARGET).mean() == pytest.approx(
        float(getattr(torch.nn, f"{name}Loss")()(PRED, TARGET))
    )


def test_huber_and_smooth_l1_differ_by_their_width() -> None:
    torch.testing.assert_close(
        Huber(delta=0.5).elementwise(PRED, TARGET), 0.5 * SmoothL1(beta=0.5).elementwise(PRED, TARGET)
    )


def test_half_precision_is_compared_in_float32() -> None:
    pred = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert by_sample(MSE(), pred, torch.zeros(1, 4096, dtype=torch.bfloat16)).dtype == torch.float32
