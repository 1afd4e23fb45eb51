"""Products with w1 (x) w2 against layers whose weight is torch.kron's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.kronecker import Kronecker


@pytest.mark.parametrize(("a", "b"), [(2, 3), (1, 1), (1, 6), (4, 1), (4, 6)])
def test_linear(check: Any, random: Any, x: Tensor, a: int, b: int) -> None:
    plain = lambda x, w1, w2: F.linear(x, torch.kron(w1, w2))  # noqa: E731
    check(Kronecker(), plain, x, random(a, b), random(4 // a, 6 // b))


@pytest.mark.parametrize(("a", "b"), [(3, 2), (1, 1), (1, 4), (6, 1), (6, 4)])
def test_conv(check: Any, random: Any, conv: Any, a: int, b: int) -> None:
    check(
        Kronecker(conv.shape),
        lambda x, w1, w2: conv.run(x, torch.kron(w1.view(a, b, *conv.ones), w2)),
        conv.x,
        random(a, b),
        random(6 // a, 4 // b, *conv.kernel),
    )


@pytest.mark.parametrize(("a", "b"), [(2, 3), (1, 1), (1, 6), (4, 1), (4, 6)])
@pytest.mark.parametrize("rank", [1, 3])
def test_chain_of_linear(check: Any, random: Any, x: Tensor, a: int, b: int, rank: int) -> None:
    plain = lambda x, w1, w2_a, w2_b: F.linear(x, torch.kron(w1, w2_a @ w2_b))  # noqa: E731
    check(Kronecker(), plain, x, random(a, b), random(4 // a, rank), random(rank, 6 // b))


@pytest.mark.parametrize(("a", "b"), [(3, 2), (1, 1), (1, 4), (6, 1), (6, 4)])
def test_chain_of_conv(check: Any, random: Any, conv: Any, a: int, b: int) -> None:
    def plain(x: Tensor, w1: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
        w2 = (w2_a @ w2_b.flatten(1)).view(-1, *w2_b.shape[1:])
        return conv.run(x, torch.kron(w1.view(a, b, *conv.ones), w2))

    check(Kronecker(conv.shape), plain, conv.x, random(a, b), random(6 // a, 2), random(2, 4 // b, *conv.kernel))
