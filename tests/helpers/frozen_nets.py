"""Frozen nets with inputs, and the gradients of adapters on them."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.prepare.activation_checkpointing import checkpointed
from lorasmith.types import Cond, Denoiser


@dataclass(frozen=True)
class Case:
    """A frozen net with inputs: the UNet of the demo's base, two tiny transformers of diffusers' classes."""

    denoiser: Denoiser
    x: Tensor
    t: Tensor
    cond: Cond

    @property
    def net(self) -> nn.Module:
        return next(iter(self.denoiser.nets.values()))


def gradients(denoiser: Denoiser, case: Case, depth: int | None = None, algorithm: Any = None) -> list[Tensor]:
    """Those of adapters on all layers, none of whose parameters is zero."""
    adapters = AdapterSet.new(denoiser, algorithm or LoRA(rank=2), Targets(preset="all"), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data.normal_(0, 0.01, generator=generator)
    with attached(denoiser, adapters), nullcontext() if depth is None else checkpointed(denoiser, depth):
        denoiser.predict(case.x, case.t, case.cond).square().mean().backward()
    found = [p.grad for p in adapters.parameters() if p.grad is not None]
    assert len(found) == len(adapters.parameters())
    return found


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
