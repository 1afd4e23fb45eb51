"""Low-rank products against layers with the merged weight up down."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops import low_rank
from lorasmith.ops.additive import updated
from lorasmith.ops.conv import ConvShape
from lorasmith.ops.low_rank import LowRankConv, LowRankLinear


@pytest.mark.parametrize("rank", [1, 3])
def test_linear(check: Any, random: Any, x: Tensor, rank: int) -> None:
    check(LowRankLinear(), lambda x, down, up: F.linear(x, up @ down), x, random(rank, 6), random(4, rank))


@pytest.mark.parametrize("most_spread", [2**19, 0])
def test_conv(check: Any, random: Any, grouped_or_not: Any, most_spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups share `down`, as readers of LoRA files have it."""
    monkeypatch.setattr(low_rank, "MOST_SPREAD", most_spread)
    rank = 3
    conv = grouped_or_not
    n_out, n_in = conv.layer.weight.shape[:2]
    check(
        LowRankConv(conv.shape),
        lambda x, down, up: conv.run(x, up.flatten(1) @ down.flatten(1)),
        conv.x,
        random(rank, n_in, *conv.kernel),
        random(n_out, rank, *conv.ones),
    )


@pytest.mark.parametrize(("n_in", "is_kept"), [(2 * low_rank.SMALL, True), (low_rank.SMALL, False)])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_inner_product_is_kept_where_it_is_small(
    random: Any, n_in: int, is_kept: bool, kernel: tuple[int, ...]
) -> None:
    ones = tuple(1 for _ in kernel)
    operation = LowRankConv(ConvShape(ones, ones, ones, 1)) if kernel else LowRankLinear()
    x, y = random(*((1, n_in, 2, 3) if kernel else (5, n_in))), random(*((1, 4, 2, 3) if kernel else (5, 4)))
    weights = [random(2, n_in, *kernel), random(4, 2, *ones)]
    if kernel:
        x, y = (t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, y))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted = updated(x, y, operation, weights, 0.7)
    others = [t for t in kept if t.data_ptr() not in {own.data_ptr() for own in (x, *weights)}]
    assert [t.numel() * low_rank.SMALL for t in others] == ([x.numel()] if is_kept else [])

    weight = (weights[1].flatten(1) @ weights[0].flatten(1)).view(4, n_in, *kernel)
    plain = y + 0.7 * (F.conv2d(x, weight, padding=1) if kernel else F.linear(x, weight))
    torch.testing.assert_close(adapted, plain)
    inputs = (x, y, *weights)
    found = torch.autograd.grad(adapted, inputs, adapted.detach() ** 2)
    torch.testing.assert_close(found, torch.autograd.grad(plain, inputs, adapted.detach() ** 2))
