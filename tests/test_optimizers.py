"""Optimizers against their papers' first step; schedules against closed forms; masters against stalling."""

import pytest
import torch
from pydantic import TypeAdapter

from lorasmith.optimizers import Constant, Cosine, Linear, Masters, Optimizer

LR, GRAD, WEIGHT = 0.1, 0.5, 2.0
FIRST_STEP = {
    "AdamW": WEIGHT * (1 - LR * 0.01) - LR,
    "Adam": WEIGHT - LR,
    "SGD": WEIGHT - LR * GRAD,
    "RMSprop": WEIGHT - LR * GRAD / (0.01 * GRAD**2) ** 0.5,
}


@pytest.mark.parametrize("name", FIRST_STEP)
def test_first_step(name: str) -> None:
    weight = torch.tensor([WEIGHT], requires_grad=True)
    optimizer = TypeAdapter(Optimizer).validate_python(name).build([weight], LR)
    weight.grad = torch.tensor([GRAD])
    optimizer.step()
    assert float(weight.detach()) == pytest.approx(FIRST_STEP[name], rel=1e-5)


def test_schedules() -> None:
    assert [Constant().factor(s, 4) for s in range(4)] == [1, 1, 1, 1]
    assert [Linear(end=0.5).factor(s, 4) for s in range(4)] == [1, 0.875, 0.75, 0.625]
    cosine = [Cosine().factor(s, 100) for s in range(100)]
    assert cosine[50] == pytest.approx(0.5) and cosine[0] == 1 and cosine == sorted(cosine, reverse=True)
    assert [Constant(warmup=3).factor(s, 9) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_masters_do_not_stall() -> None:
    """1000 steps of 2^-12 move a bf16 weight of 1 nowhere, and its master all the way."""
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    masters = Masters([weight])
    optimizer = torch.optim.SGD(masters.tensors, lr=2**-12)
    for _ in range(1024):
        weight.grad = -torch.ones(1, dtype=torch.bfloat16)
        masters.take_gradients()
        optimizer.step()
        masters.write()
    assert float(weight.detach()) == 1.25
    assert float(torch.ones(1, dtype=torch.bfloat16) + 2**-12) == 1


def test_fp32_parameters_are_their_own_masters() -> None:
    weight = torch.ones(1, requires_grad=True)
    assert Masters([weight]).tensors[0] is weight
