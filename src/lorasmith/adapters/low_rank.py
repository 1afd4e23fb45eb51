"""What algorithms with low-rank factors share: the size of a layer, the norm, and how those of several layers are one.

A layer of the original code has the rows of its members, one after another: r a member's rank, R the whole's, n its
rows. The factors stand on a diagonal of blocks, so that the whole's delta is exactly the members' deltas:

    [B1 A1]   [B1   ] [A1]        [(a1 b1) * (c1 d1)]   ([a1   ] [b1])   ([c1   ] [d1])
    [B2 A2] = [   B2] [A2],       [(a2 b2) * (c2 d2)] = ([   a2] [b2]) * ([   c2] [d2])
"""

from abc import ABC
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lorasmith.adapters.base import Adapter, Member
from lorasmith.adapters.parts import DOWN, UP, Parts, alpha_of, fitting, size_of

Pairs = Sequence[tuple[str, str]]
"""Factors [n, r], with those [r, n_in] that they are multiplied by."""
LORA_PAIR = ((UP, DOWN),)


class LowRankAdapter(Adapter, ABC):
    """An adapter whose update is B A before anything else, under kohya's names."""

    RANKED = {DOWN: 0}
    CORES = {"lora_mid.weight": (UP, DOWN)}
    IS_LOW_RANK = True
    DIFFUSERS_READS = True

    @classmethod
    def delta_norm(cls, parts: Parts) -> float:
        """Of up down."""
        return product_norm(parts[UP], parts[DOWN]) * abs(scale_of(parts, len(parts[DOWN])))

    @classmethod
    def layer_sizes(cls, parts: Parts) -> tuple[int, int, tuple[int, ...] | None] | None:
        """The kernel too."""
        if DOWN not in parts or parts[DOWN].ndim < 2:
            return None
        return size_of(parts, UP, 0), parts[DOWN].shape[1], tuple(parts[DOWN].shape[2:])


def product_norm(up: Tensor, down: Tensor) -> float:
    """|U D|, by the r x r products: its square is the trace of U^T U D D^T. up [n_out, r, 1…], down [r, n_in, k…]."""
    up, down = up.flatten(1), down.flatten(1)
    square = ((up.T @ up) * (down @ down.T)).sum()
    return float(square.clamp(min=0).sqrt())


def scale_of(parts: Parts, rank: int) -> float:
    """alpha / rank of a file's parts; 1 where they have no alpha."""
    return alpha_of(parts, rank) / rank


def lora_to_peft(parts: Parts) -> dict[str, Tensor]:
    """A and B under PEFT's names, which have no alpha: B is scaled."""
    return {
        "lora_A.weight": parts[DOWN],
        "lora_B.weight": scaled(parts[UP], scale_of(parts, len(parts[DOWN]))),
    }


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """A tensor times a number, in its own dtype."""
    return tensor if scale == 1 else (tensor.float() * scale).to(tensor.dtype)


def fuse_pairs(members: Sequence[Member], pairs: Pairs) -> dict[str, Tensor]:
    """The whole's factors; its scale is the members', or 1 where they differ."""
    column = pairs[0][1]
    ranks = [len(m.parts[column]) if column in m.parts else 0 for m in members]
    scales = [scale_of(m.parts, rank) if rank else None for m, rank in zip(members, ranks, strict=True)]
    given = [scale for scale in scales if scale is not None]
    same = len(set(given)) == 1
    whole = {"alpha": torch.tensor(given[0] * sum(ranks) if same else sum(ranks), dtype=torch.float32)}
    for number, (name, other) in enumerate(pairs):
        blocks = [
            torch.zeros(member.rows, 0, dtype=torch.float32) if scale is None
            else member.parts[name] if same or number
            else (member.parts[name].float() * scale).to(member.parts[name].dtype)
            for member, scale in zip(members, scales, strict=True)
        ]  # fmt: skip
        dtype = next(m.parts[name].dtype for m in members if name in m.parts)
        whole[name] = torch.block_diag(*blocks).to(dtype)
        whole[other] = torch.cat([m.parts[other] for m in members if other in m.parts])
    return whole


def split_pairs(
    parts: Parts, members: Sequence[Member], pairs: Pairs, changed: Sequence[bool] = ()
) -> list[dict[str, Tensor]]:
    """Each member has its rows of one factor and all of the other; of a diagonal of blocks its block alone.

    changed: the members that have something whatever their factors are.
    """
    rows, rank = [member.rows for member in members], size_of(parts, pairs[0][1], 0)
    for row, column in pairs:
        fitting(parts, row, (sum(rows), rank))
        fitting(parts, column, (rank, size_of(parts, column, 1)))
    cut = [split_rows(parts, row, rows) for row, _ in pairs]
    scale = scale_of(parts, rank)
    live = [any(piece.any() for piece in pieces) for pieces in zip(*cut, strict=True)]
    live = [one or other for one, other in zip(live, changed or [False] * len(rows), strict=True)]
    spans = _spans(cut, live if any(live) else [True] * len(rows), rank)
    found: list[dict[str, Tensor]] = [{} for _ in members]
    for number, span in enumerate(spans):
        if span is not None:
            for (row, column), pieces in zip(pairs, cut, strict=True):
                found[number] |= {row: pieces[number][:, span].clone(), column: parts[column][span].clone()}
            found[number]["alpha"] = torch.tensor(scale * (span.stop - span.start), dtype=torch.float32)
    return found


def _spans(cut: Sequence[Sequence[Tensor]], live: Sequence[bool], rank: int) -> list[slice | None]:
    """The columns that each member uses: a block of its own where there is a diagonal of equal ones, else all."""
    width, rest = divmod(rank, sum(live))
    starts = accumulate((width if is_live else 0 for is_live in live), initial=0)
    blocks = [slice(start, start + width) if is_live else None for is_live, start in zip(live, starts, strict=False)]
    is_diagonal = not rest and all(
        not piece[:, : block.start].any() and not piece[:, block.stop :].any()
        for pieces in cut
        for piece, block in zip(pieces, blocks, strict=True)
        if block is not None
    )
    return blocks if is_diagonal else [slice(0, rank) if is_live else None for is_live in live]


def split_rows(parts: Parts, name: str, rows: Sequence[int]) -> list[Tensor]:
    """A part's rows for each member; ValueError where it has not as many as they have."""
    if not parts[name].ndim or len(parts[name]) != sum(rows):
        raise ValueError(f"{name} must have {sum(rows)} rows, got {list(parts[name].shape)}")
    return [piece.clone() for piece in parts[name].split(list(rows))]
