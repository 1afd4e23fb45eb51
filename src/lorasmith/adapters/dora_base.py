"""What DoRA's adapters share, whose lengths are of the layer's outputs (`dora.py`) or inputs (`dora_inputs.py`)."""

from abc import ABC
from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.adapters.base import Member
from lorasmith.adapters.frozen_weight import loaded, row_squares
from lorasmith.adapters.lora import LoRAAdapter
from lorasmith.adapters.low_rank import LORA_PAIR, LowRankAdapter, fuse_pairs, lora_to_peft, split_pairs, split_rows
from lorasmith.adapters.parts import SCALE, UP, VECTOR, Parts
from lorasmith.ops.dora import lengths_of


class AnyDoRAAdapter(LowRankAdapter, ABC):
    """A LoRA, and lengths that stand beside its factors in a file."""

    algorithm = "DoRA"
    MARKS = frozenset({SCALE, VECTOR})
    SUFFIXES = LoRAAdapter.SUFFIXES | MARKS
    EXTENDS = LoRAAdapter
    BY_OUTPUT = LoRAAdapter.BY_OUTPUT | MARKS
    IN_FLOAT32 = LoRAAdapter.IN_FLOAT32 | MARKS
    IS_ADDITIVE = False
    NEEDS_WEIGHT = True
    LYCORIS_ARGS = {"algo": "locon", "dora_wd": "True", "wd_on_output": "True"}
    DEPENDS_ON_LAYOUT = True
    COMFYUI_BYPASS = False

    @classmethod
    def fuse(cls, members: Sequence[Member]) -> dict[str, Tensor]:
        """The factors on a diagonal of blocks, and the lengths one after another."""
        whole = fuse_pairs(members, LORA_PAIR)
        if any(SCALE in m.parts and len(m.parts[SCALE]) != m.rows for m in members):
            raise ValueError(
                f"{SCALE} of a number for each input is of one layer, and cannot become one of several layers"
            )
        if any(SCALE in m.parts for m in members):
            whole[SCALE] = torch.cat([m.parts[SCALE] if SCALE in m.parts else _own_lengths(m) for m in members])
        return whole

    @classmethod
    def split(cls, parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
        """A member's rows of B and its lengths, which are something where they are not those of its own weight."""
        length = SCALE if SCALE in parts else VECTOR
        lengths = split_rows(parts, length, [member.rows for member in members])
        changed = [
            not torch.allclose(piece.flatten().float(), _own_lengths(member).flatten(), rtol=1e-6)
            for piece, member in zip(lengths, members, strict=True)
        ]
        found = split_pairs(parts, members, LORA_PAIR, changed)
        return [own | {length: piece} if own else own for own, piece in zip(found, lengths, strict=True)]

    @classmethod
    def to_peft(cls, parts: Parts) -> dict[str, Tensor]:
        """A LoRA's, and the lengths as a vector; ValueError where they are of the inputs."""
        if SCALE not in parts:
            return lora_to_peft(parts)
        lengths = parts[SCALE]
        if len(lengths) != len(parts[UP]):
            raise ValueError(f"diffusers reads no {SCALE} of a number for each input: use another file_layout")
        return {**lora_to_peft(parts), VECTOR: lengths.transpose(0, 1) if lengths.ndim > 2 else lengths.flatten()}


def _own_lengths(member: Member) -> Tensor:
    """DoRA's lengths [n, 1] that change nothing."""
    return lengths_of(row_squares(loaded(member.base))).view(-1, 1).float()
