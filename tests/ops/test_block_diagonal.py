"""Block-diagonal matrices against torch.block_diag and torch.kron, and their gradients against autograd's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.ops.block_diagonal import WIDTH, joined, parted, repeated, spread, summed, together, traced

EYE = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize("num_blocks", [1, 7, 40, 160])
@pytest.mark.parametrize("size", [1, 5, 8, 63, 64, 65, 200])
def test_as_many_are_taken_together_as_fit(num_blocks: int, size: int) -> None:
    m = together(num_blocks, size)
    assert num_blocks % m == 0 and (m == 1 or m * size <= WIDTH)
    assert not any(num_blocks % more == 0 and more * size <= WIDTH for more in range(m + 1, num_blocks + 1))


def test_joined_is_block_diagonal(random: Any) -> None:
    blocks = random(6, 2, 5)
    wide = joined(blocks.detach(), 3)
    assert torch.equal(torch.block_diag(*wide), torch.block_diag(*blocks.detach()))
    assert torch.equal(parted(wide, 3), blocks)


def test_repeated_and_spread_are_kroneckers_products(random: Any) -> None:
    block, kernel = random(2, 5).detach(), random(2, 5, 3, 2).detach()
    assert torch.equal(repeated(block, 3), torch.kron(EYE, block))
    assert torch.equal(repeated(kernel, 3), torch.kron(EYE.view(3, 3, 1, 1), kernel))
    assert torch.equal(spread(block, 3), torch.kron(block, EYE))


WAYS = [
    (lambda block: torch.kron(EYE, block), lambda grad: summed(grad, 3)),
    (lambda block: torch.kron(block, EYE), lambda grad: traced(grad, 3)),
]


@pytest.mark.parametrize(("plain", "back"), WAYS, ids=["repeated", "spread"])
def test_their_gradients(random: Any, plain: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
    block = random(2, 5)
    wide = plain(block)
    grad = random(*wide.shape).detach()
    torch.testing.assert_close(back(grad), torch.autograd.grad(wide, block, grad)[0])
