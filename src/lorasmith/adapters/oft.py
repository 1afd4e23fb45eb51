"""OFT (Qiu et al. 2023, "Controlling text-to-image diffusion by orthogonal finetuning"): W is turned in blocks.

n blocks of s outputs each; R = (I + Q)(I - Q)^-1 with Q = B - B^T (Cayley's transform, their eq. 5), and a row block of
W becomes R^T times it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.base import Adapter, Layer, Member
from lorasmith.adapters.lokr import factorized
from lorasmith.adapters.parts import Parts, alpha_of, fitting, for_file, size_of
from lorasmith.ops.rotation import cayley, rotated

BLOCKS = "oft_blocks"


class OFTAdapter(Adapter):
    """The adapter of one layer."""

    algorithm = "OFT"
    MARKS = frozenset({BLOCKS})
    SUFFIXES = MARKS | {"alpha"}
    RANKED = {BLOCKS: -1}
    RANK_WORDS = "blocks of "
    SCALED_BY_RANK = False
    BY_OUTPUT = MARKS
    IS_ADDITIVE = False
    NEEDS_BIAS = True
    LYCORIS_ARGS = {"algo": "diag-oft"}
    COMFYUI_BYPASS = False
    takes_base = False

    def __init__(self, layer: Layer, blocks: Tensor, constraint: float) -> None:
        """blocks [n, s, s]; constraint 0 is none. ValueError where a block would mix a convolution's groups."""
        super().__init__()
        if layer.n_out // layer.groups % blocks.shape[1]:
            raise ValueError(
                f"OFT's blocks must divide the {layer.n_out // layer.groups} outputs of a convolution's group, "
                f"got blocks of {blocks.shape[1]}"
            )
        self.blocks = nn.Parameter(blocks)
        self.layer = layer
        self.constraint = constraint

    @classmethod
    def new(cls, layer: Layer, rank: int, constraint: float | None) -> "OFTAdapter":
        """The identity; ValueError where its blocks would be single numbers, which cannot turn."""
        size, num_blocks = factorized(layer.n_out, rank)
        if size == 1:
            is_prime = factorized(layer.n_out, None)[0] == 1
            raise ValueError(
                f"OFT needs blocks of 2 or more, but rank {rank} cuts {layer.n_out} outputs into single ones; "
                f"{'' if is_prime else 'give another rank or '}add the layer to targets.exclude"
            )
        return cls(layer, torch.zeros(num_blocks, size, size, dtype=torch.float32), constraint or 0.0)

    @classmethod
    def from_file(cls, layer: Layer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> "OFTAdapter":
        """The adapter that a file holds for this layer; ValueError where its shapes do not fit the layer."""
        size = max(1, size_of(tensors, BLOCKS, -1))
        blocks = fitting(tensors, BLOCKS, (layer.n_out // size, size, size))
        if len(blocks) * size != layer.n_out:
            raise ValueError(f"oft_blocks must make {layer.n_out} outputs, got {list(blocks.shape)}")
        return cls(layer, blocks, constraint_of(tensors))

    @property
    def rank(self) -> int:
        return self.blocks.shape[1]

    @property
    def alpha(self) -> float | None:
        return self.constraint or None

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None = None, base: nn.Module | None = None) -> Tensor:
        """y [..., n_out] or [B, n_out, …], bias [n_out] -> adapted y, in y's dtype."""
        turn = turn_of(self.blocks.float(), self._limit).to(self.blocks.dtype)
        return rotated(y, turn, bias, self.layer.conv is not None)

    def merged(self, weight: Tensor) -> Tensor:
        """R^T W in blocks, float32."""
        turn = turn_of(self.blocks.float(), self._limit)
        rows = weight.float().reshape(*turn.shape[:2], -1)
        return (rows + turn.mT @ rows).view(weight.shape)

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The blocks, Q within its limit, and the limit as alpha.

        LyCORIS multiplies alpha by the layer's outputs, ComfyUI does not; alpha is raised to the norm of Q where that
        is greater, so that both read the same delta.
        """
        blocks = self.blocks.detach().float()
        within = limited(blocks - blocks.mT, self._limit)
        alpha = max(self.constraint, 1.01 * float(within.norm())) if self.constraint else 0.0
        return for_file({BLOCKS: blocks if alpha == self.constraint else within / 2}, alpha, dtype)

    def restore(self, stated: Mapping[str, Any]) -> None:
        """The limit, which a file's alpha may be greater than."""
        if stated.get("name") == self.algorithm and stated.get("alpha"):
            self.constraint = float(stated["alpha"])

    @classmethod
    def delta_norm(cls, parts: Parts) -> float:
        """Of R - I."""
        blocks = parts[BLOCKS]
        return float(turn_of(blocks, constraint_of(parts) * blocks.shape[0] * blocks.shape[1]).norm())

    @classmethod
    def layer_sizes(cls, parts: Parts) -> tuple[int, int, tuple[int, ...] | None] | None:
        """None: the blocks do not say the inputs."""
        return None

    @classmethod
    def fuse(cls, members: Sequence[Member]) -> dict[str, Tensor]:
        """The blocks one after another, within their members' limits, which the whole's does not undercut."""
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

    @classmethod
    def split(cls, parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
        """Each member's blocks, of which none may reach from one to another."""
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

    @classmethod
    def to_peft(cls, parts: Parts) -> dict[str, Tensor] | None:
        """None: PEFT's OFT turns the inputs."""
        return None

    @property
    def _limit(self) -> float:
        return self.constraint * self.layer.n_out


def constraint_of(tensors: Mapping[str, Tensor]) -> float:
    """A file's limit of Q; 0, where it is infinite or, as in LyCORIS, below 0, for none."""
    alpha = alpha_of(tensors, 0.0, also=math.inf)
    return max(0.0, alpha) if math.isfinite(alpha) else 0.0


def turn_of(blocks: Tensor, limit: float) -> Tensor:
    """blocks [n, s, s] -> R - I, which is 0 where Q is. limit: the greatest norm of Q; 0 for none."""
    return cayley(limited(blocks - blocks.mT, limit))


def limited(q: Tensor, limit: float) -> Tensor:
    """q [n, s, s] -> no longer than the limit; 0 for none."""
    return q * (limit / (q.norm() + 1e-8)).clamp(max=1) if limit else q


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
