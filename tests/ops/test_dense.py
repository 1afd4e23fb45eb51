"""Products with a weight of the layer's shape against the layers themselves."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.dense import DenseConv, DenseLinear


def test_linear(check: Any, random: Any, x: Tensor) -> None:
    check(DenseLinear(), F.linear, x, random(4, 6))


def test_conv(check: Any, random: Any, grouped_or_not: Any) -> None:
    conv = grouped_or_not
    check(DenseConv(conv.shape), conv.run, conv.x, random(*conv.layer.weight.shape))
