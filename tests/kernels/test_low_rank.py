"""Low-rank products against layers with the merged weight up down."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from lorasmith.kernels import low_rank
from lorasmith.kernels.low_rank import LowRankConv, LowRankLinear


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
