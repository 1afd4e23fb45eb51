"""Adapters of several layers as one adapter of the layer that the original code made of them, and the way back.

The layer's rows are those of its members, one after another: r a member's rank, R the whole's, n its rows. Low-rank
factors stand on a diagonal of blocks, so that the whole's delta is exactly the members' deltas:

    [B1 A1]   [B1   ] [A1]        [(a1 b1) * (c1 d1)]   ([a1   ] [b1])   ([c1   ] [d1])
    [B2 A2] = [   B2] [A2],       [(a2 b2) * (c2 d2)] = ([   a2] [b2]) * ([   c2] [d2])
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import OFFSETS, alpha_of, fitting, size_of
from lorasmith.adapters.dora import SCALE, VECTOR
from lorasmith.adapters.frozen_weight import loaded, row_squares
from lorasmith.adapters.oft import constraint_of, limited
from lorasmith.adapters.registry import kind_of, refuse_unread
from lorasmith.formats.keys import DOWN, UP, by_layer, split
from lorasmith.formats.module_names import ModuleNames
from lorasmith.ops.dora import lengths_of
from lorasmith.types import Denoiser

Parts = Mapping[str, Tensor]
"""{suffix in a file: tensor} of one layer."""
LORA = ((UP, DOWN),)
PAIRS = {"LoRA": LORA, "DoRA": LORA, "LoHa": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))}
"""{algorithm: its factors [n, r], with those [r, n_in] that they are multiplied by}."""
BLOCKS = "oft_blocks"
LEFT = ("lokr_w1", "lokr_w1_a")
RIGHT = ("lokr_w2", "lokr_w2_a")


@dataclass(frozen=True)
class Member:
    """A linear layer that is part of another, and what a file holds for it."""

    base: nn.Module
    parts: Parts = field(default_factory=dict)

    @property
    def rows(self) -> int:
        assert isinstance(self.base.weight, Tensor)
        return self.base.weight.shape[0]

    def zeros(self, part: str) -> Tensor:
        """An offset that changes nothing; ValueError where there is no such parameter."""
        parameter = dict(self.base.named_parameters(recurse=False)).get(OFFSETS[part])
        if parameter is None:
            raise ValueError(f"{part} must hold rows for each part of a layer, but one has no {OFFSETS[part]}")
        return torch.zeros(parameter.shape, dtype=torch.float32)


def joined(members: Sequence[Member], *, swapped: bool = False) -> dict[str, Tensor]:
    """The parts of the layer that the members make; ValueError where they are not of one algorithm that can be joined.

    Members without an adapter get one that changes nothing. swapped: the whole's halves come the other way round.
    """
    whole: dict[str, Tensor] = {}
    for part in OFFSETS:
        if any(part in member.parts for member in members):
            whole[part] = torch.cat([m.parts[part] if part in m.parts else m.zeros(part) for m in members])
    adapters = [{part: t for part, t in m.parts.items() if part not in OFFSETS} for m in members]
    kinds = sorted({kind.algorithm for parts in adapters if (kind := kind_of(parts))})
    if len(kinds) > 1:
        raise ValueError(f"adapters must be of one algorithm to become one, got {' and '.join(kinds)}")
    if kinds and len(members) == 1:
        whole |= adapters[0]
    elif kinds:
        whole |= JOINED[kinds[0]]([Member(m.base, parts) for m, parts in zip(members, adapters, strict=True)])
    return _halves_swapped(whole) if swapped else whole


def parted(parts: Parts, members: Sequence[Member], *, swapped: bool = False) -> list[dict[str, Tensor]]:
    """What each member has of a whole's parts, nothing where that changes nothing; ValueError if it cannot be cut."""
    parts = _halves_swapped(parts) if swapped else parts
    if len(members) == 1:
        return [dict(parts)]
    rows = [member.rows for member in members]
    adapter = {part: tensor for part, tensor in parts.items() if part not in OFFSETS}
    kind = kind_of(adapter)
    if adapter:
        refuse_unread(adapter, kind.SUFFIXES if kind else ())
    found = PARTED[kind.algorithm](adapter, members) if kind else [{} for _ in members]
    for part in OFFSETS.keys() & parts.keys():
        for own, piece in zip(found, _by_rows(parts, part, rows), strict=True):
            own[part] = piece
    return found


def _halves_swapped(parts: Parts) -> dict[str, Tensor]:
    """The parts of a layer with the halves of its rows the other way round; ValueError where a part mixes both."""
    turned = dict(parts)
    for part in parts.keys() & {UP, SCALE, VECTOR, "hada_w1_a", "hada_w2_a", BLOCKS, *LEFT, *OFFSETS}:
        if len(parts[part]) % 2:
            raise ValueError(
                f"{part} must have an even number of rows for a layer in two halves, got {len(parts[part])}"
            )
        turned[part] = torch.cat(parts[part].chunk(2)[::-1])
    return turned


def _join_pairs(members: Sequence[Member]) -> dict[str, Tensor]:
    """Of low-rank factors; the whole's scale is the members', or 1 where they differ."""
    kinds = [kind_of(member.parts) for member in members]
    pairs = next(PAIRS[kind.algorithm] for kind in kinds if kind)
    row, column = pairs[0]
    ranks = [len(m.parts[column]) if column in m.parts else 0 for m in members]
    scales = [alpha_of(m.parts, rank) / rank if rank else None for m, rank in zip(members, ranks, strict=True)]
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
    if any(SCALE in m.parts and len(m.parts[SCALE]) != m.rows for m in members):
        raise ValueError(f"{SCALE} of a number for each input is of one layer, and cannot become one of several layers")
    if any(SCALE in m.parts for m in members):
        whole[SCALE] = torch.cat([m.parts[SCALE] if SCALE in m.parts else _own_lengths(m) for m in members])
    return whole


def _own_lengths(member: Member) -> Tensor:
    """DoRA's lengths [n, 1] that change nothing."""
    return lengths_of(row_squares(loaded(member.base))).view(-1, 1).float()


def _part_pairs(parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
    """Each member has its rows of one factor and all of the other; of a diagonal of blocks its block alone."""
    kind = kind_of(parts)
    assert kind is not None
    pairs, length = PAIRS[kind.algorithm], next((name for name in (SCALE, VECTOR) if name in parts), None)
    rows, rank = [member.rows for member in members], size_of(parts, pairs[0][1], 0)
    for row, column in pairs:
        fitting(parts, row, (sum(rows), rank))
        fitting(parts, column, (rank, size_of(parts, column, 1)))
    cut = [_by_rows(parts, row, rows) for row, _ in pairs]
    lengths = _by_rows(parts, length, rows) if length else None
    scale = alpha_of(parts, rank) / rank
    live = [any(piece.any() for piece in pieces) for pieces in zip(*cut, strict=True)]
    if lengths is not None:
        live = [
            is_live or not torch.allclose(piece.flatten().float(), _own_lengths(member).flatten(), rtol=1e-6)
            for is_live, piece, member in zip(live, lengths, members, strict=True)
        ]
    spans = _spans(cut, live if any(live) else [True] * len(rows), rank)
    found: list[dict[str, Tensor]] = [{} for _ in members]
    for number, span in enumerate(spans):
        if span is not None:
            for (row, column), pieces in zip(pairs, cut, strict=True):
                found[number] |= {row: pieces[number][:, span].clone(), column: parts[column][span].clone()}
            found[number]["alpha"] = torch.tensor(scale * (span.stop - span.start), dtype=torch.float32)
            if length and lengths:
                found[number][length] = lengths[number]
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


def _join_kronecker(members: Sequence[Member]) -> dict[str, Tensor]:
    raise ValueError("Kronecker products of several layers make no Kronecker product of the one that they are there")


def _part_kronecker(parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
    """Each member has its rows of w1, where w2 is not cut."""
    rows = [member.rows for member in members]
    left = next((name for name in LEFT if name in parts), None)
    height = next((len(parts[name]) for name in RIGHT if name in parts and parts[name].ndim), 0)
    if left is None or not height or len(parts[left]) * height != sum(rows) or any(n % height for n in rows):
        raise ValueError(f"lokr_w2, of {height} rows, must fit into each of the layers of {list(rows)} rows it is for")
    pieces = parts[left].split([n // height for n in rows])
    return [{**parts, left: piece.clone()} for piece in pieces]


def _join_blocks(members: Sequence[Member]) -> dict[str, Tensor]:
    """OFT's blocks one after another, within their members' limits, which the whole's does not undercut."""
    size = next(m.parts[BLOCKS].shape[-1] for m in members if BLOCKS in m.parts)
    blocks, constraints = [], []
    for member in members:
        count, rest = divmod(member.rows, size)
        own = member.parts.get(BLOCKS, torch.zeros(count, size, size, dtype=torch.float32))
        if rest or own.shape[-1] != size:
            raise ValueError(
                f"OFT's blocks must be of one size for layers that become one, got {size} and {own.shape[-1]} for "
                f"{[m.rows for m in members]} outputs"
            )
        blocks.append(own)
        constraints.append(constraint_of(member.parts) if BLOCKS in member.parts else 0.0)
    return _within(blocks, constraints)


def _part_blocks(parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
    rows = [member.rows for member in members]
    size = max(1, size_of(parts, BLOCKS, -1))
    blocks = fitting(parts, BLOCKS, (sum(rows) // size, size, size))
    if sum(rows) % size or any(n % size for n in rows):
        raise ValueError(f"oft_blocks of {size} must fit into each of the layers of {list(rows)} outputs it is for")
    alpha = constraint_of(parts)
    whole = limited(blocks.float() - blocks.float().mT, alpha * sum(rows)).to(blocks.dtype) / 2 if alpha else blocks
    pieces = whole.split([n // size for n in rows])
    is_new = not any(piece.any() for piece in pieces)
    return [_within([piece.clone()], [alpha]) if is_new or piece.any() else {} for piece in pieces]


def _within(blocks: Sequence[Tensor], constraints: Sequence[float]) -> dict[str, Tensor]:
    """Blocks [n, s, s] as one, with Q within each one's limit, for readers that multiply alpha by n s and others.

    Where nothing is limited, the blocks stay as they are.
    """
    if not any(constraints):
        return {BLOCKS: torch.cat(list(blocks)), "alpha": torch.tensor(0.0, dtype=torch.float32)}
    turns = [own.float() - own.float().mT for own in blocks]
    limits = [constraint * own[:, 0].numel() for own, constraint in zip(blocks, constraints, strict=True)]
    whole = torch.cat([limited(turn, limit) for turn, limit in zip(turns, limits, strict=True)])
    alpha = max(*constraints, 1.01 * float(whole.norm()))
    return {BLOCKS: (whole / 2).to(blocks[0].dtype), "alpha": torch.tensor(alpha, dtype=torch.float32)}


def _by_rows(parts: Parts, name: str, rows: Sequence[int]) -> list[Tensor]:
    """A part's rows for each member; ValueError where it has not as many as they have."""
    if not parts[name].ndim or len(parts[name]) != sum(rows):
        raise ValueError(f"{name} must have {sum(rows)} rows, got {list(parts[name].shape)}")
    return [piece.clone() for piece in parts[name].split(list(rows))]


JOINED: Mapping[str, Callable[[Sequence[Member]], dict[str, Tensor]]] = {
    "LoRA": _join_pairs, "DoRA": _join_pairs, "LoHa": _join_pairs, "LoKr": _join_kronecker, "OFT": _join_blocks,
}  # fmt: skip
PARTED: Mapping[str, Callable[[Parts, Sequence[Member]], list[dict[str, Tensor]]]] = {
    "LoRA": _part_pairs, "DoRA": _part_pairs, "LoHa": _part_pairs, "LoKr": _part_kronecker, "OFT": _part_blocks,
}  # fmt: skip


def by_modules(state: Mapping[str, Tensor], denoiser: Denoiser) -> tuple[dict[str, Tensor], list[str]]:
    """A file's LoRA, whose layers that are several modules here are cut into theirs, and what cannot be cut.

    What is cut is named by the modules; the rest stays as it is.
    """
    names = ModuleNames(denoiser)
    modules = {f"{name}.{path}": m for name, net in denoiser.nets.items() for path, m in net.named_modules()}
    cut: dict[str, Tensor] = {}
    wholes: set[str] = set()
    misfits: list[str] = []
    for key, parts in by_layer(state).items():
        whole = names.whole(key)
        if whole is None:
            continue
        wholes.add(key)
        try:
            members = parted(parts, [Member(modules[path]) for path in whole.paths], swapped=whole.swapped)
            own = {f"{path}.{part}": t for path, m in zip(whole.paths, members, strict=True) for part, t in m.items()}
            if own.keys() & (cut.keys() | state.keys()):
                raise ValueError("another key means the same layer")
        except ValueError as error:
            misfits.append(f"{key}: {error}")
            continue
        cut |= own
    return {key: tensor for key, tensor in state.items() if split(key)[0] not in wholes} | cut, misfits
