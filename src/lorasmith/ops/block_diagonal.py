"""Block-diagonal matrices: matrix libraries are slow at blocks of a few numbers, so some are taken together.

n blocks [s, t]; m of them together, in n / m matrices [m s, m t]; k… further axes.
"""

from torch import Tensor

WIDTH = 64
"""The most numbers that neighbouring blocks are taken together to."""


def together(num_blocks: int, size: int) -> int:
    """How many of these blocks of so many numbers are taken together: a divisor of their number."""
    return max(m for m in range(1, max(1, WIDTH // size) + 1) if num_blocks % m == 0)


def joined(blocks: Tensor, m: int) -> Tensor:
    """blocks [n, s, t] -> [n / m, m s, m t], block-diagonal."""
    num_blocks, rows, columns = blocks.shape
    wide = blocks.new_zeros(num_blocks // m, m, rows, m, columns)
    wide.diagonal(dim1=1, dim2=3).copy_(blocks.view(-1, m, rows, columns).permute(0, 2, 3, 1))
    return wide.view(-1, m * rows, m * columns)


def parted(wide: Tensor, m: int) -> Tensor:
    """[n / m, m s, m t] -> the blocks [n, s, t] along the diagonals."""
    _, rows, columns = wide.shape
    blocks = wide.view(-1, m, rows // m, m, columns // m).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 1, 2).reshape(-1, rows // m, columns // m)


def repeated(block: Tensor, m: int) -> Tensor:
    """block [s, t, k…] -> I (x) block [m s, m t, k…]."""
    if m == 1:
        return block
    rows, columns, *others = block.shape
    wide = block.new_zeros(m, rows, m, columns, *others)
    wide.diagonal(dim1=0, dim2=2).copy_(block.unsqueeze(-1).expand(*block.shape, m))
    return wide.view(m * rows, m * columns, *others)


def summed(wide: Tensor, m: int) -> Tensor:
    """[m s, m t, k…] -> the sum [s, t, k…] of the blocks along the diagonal."""
    rows, columns, *others = wide.shape
    return wide.view(m, rows // m, m, columns // m, *others).diagonal(dim1=0, dim2=2).sum(-1)


def spread(w: Tensor, size: int) -> Tensor:
    """w [a, b] -> w (x) I [a size, b size]."""
    wide = w.new_zeros(len(w), size, w.shape[1], size)
    wide.diagonal(dim1=1, dim2=3).copy_(w.unsqueeze(-1).expand(*w.shape, size))
    return wide.view(len(w) * size, -1)


def traced(wide: Tensor, size: int) -> Tensor:
    """[a size, b size] -> the traces [a, b] of its blocks [size, size]."""
    return wide.view(len(wide) // size, size, -1, size).diagonal(dim1=1, dim2=3).sum(-1)
