"""Optimizers, the laws of the learning rate, fp32 masters of 16-bit adapters, and the scale of fp16 losses."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorasmith.component import Component, named

Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Eps = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description="added to the denominator")]
WeightDecay = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


class _Adam(Component):
    """What both kinds of Adam share."""

    beta1: Beta = Field(default=0.9, description="decay of the mean of gradients")
    beta2: Beta = Field(default=0.999, description="decay of the mean of squared gradients")
    eps: Eps = 1e-8


class AdamW(_Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    name: Literal["AdamW"] = "AdamW"
    weight_decay: WeightDecay = Field(default=0.01, description="share of the weight taken off a step, times the rate")

    def build(self, params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            params, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


class Adam(_Adam):
    """Adam (Kingma and Ba 2015, algorithm 1); weight decay is added to the gradient."""

    name: Literal["Adam"] = "Adam"
    weight_decay: WeightDecay = Field(default=0.0, description="times the weight, added to the gradient")

    def build(self, params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            params, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


class SGD(Component):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, eq. 1)."""

    name: Literal["SGD"] = "SGD"
    momentum: Beta = Field(default=0.0, description="decay of the velocity")
    weight_decay: WeightDecay = Field(default=0.0, description="times the weight, added to the gradient")

    def build(self, params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)


class RMSprop(Component):
    """Gradients divided by the root of their running mean square (Hinton 2012, lecture 6e)."""

    name: Literal["RMSprop"] = "RMSprop"
    alpha: Beta = Field(default=0.99, description="decay of the mean of squared gradients")
    momentum: Beta = Field(default=0.0, description="decay of the velocity")
    eps: Eps = 1e-8
    weight_decay: WeightDecay = Field(default=0.0, description="times the weight, added to the gradient")

    def build(self, params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(
            params, lr=lr, alpha=self.alpha, momentum=self.momentum, eps=self.eps, weight_decay=self.weight_decay
        )


Optimizer = Annotated[AdamW | Adam | SGD | RMSprop, Field(discriminator="name"), named("AdamW")]

Warmup = Annotated[int, Field(ge=0, le=100_000, description="steps over which the rate rises from 0")]


def _warmed(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


class Constant(Component):
    """The rate stays as it is."""

    name: Literal["constant"] = "constant"
    warmup: Warmup = 0

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by in step 0 to steps - 1."""
        return _warmed(step, self.warmup)


class Linear(Component):
    """The rate falls in a straight line."""

    name: Literal["linear"] = "linear"
    warmup: Warmup = 0
    end: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False, description="factor that the rate falls to")

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by in step 0 to steps - 1."""
        return _warmed(step, self.warmup) * (1 - (1 - self.end) * step / steps)


class Cosine(Component):
    """The rate falls along half a cosine wave (Loshchilov and Hutter 2017, eq. 5)."""

    name: Literal["cosine"] = "cosine"
    warmup: Warmup = 0
    end: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False, description="factor that the rate falls to")

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by in step 0 to steps - 1."""
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        return _warmed(step, self.warmup) * (self.end + (1 - self.end) * fall)


Schedule = Annotated[Constant | Linear | Cosine, Field(discriminator="name"), named("constant")]


class Masters:
    """fp32 copies of 16-bit parameters, so that small steps are not lost (Micikevicius et al. 2018, section 3.1)."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.tensors = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_() for p in params
        ]
        self.by_param = {id(param): master for param, master in zip(self.params, self.tensors, strict=True)}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Adds the parameters' gradients to the masters', in fp32, and takes them from the parameters."""
        for param, master in zip(self.params, self.tensors, strict=True):
            if master is not param and param.grad is not None:
                grad = param.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                param.grad = None

    @torch.no_grad()
    def unscale(self, scale: float) -> None:
        """Divides the masters' gradients by the scale of the loss."""
        for master in self.tensors:
            if master.grad is not None and scale != 1:
                master.grad /= scale

    def clear(self) -> None:
        """Forgets all gradients."""
        for tensor in (*self.params, *self.tensors):
            tensor.grad = None

    def flat_gradient(self) -> Tensor:
        """All gradients in one vector; zeros where there is none."""
        return torch.cat([(torch.zeros_like(m) if m.grad is None else m.grad).flatten() for m in self.tensors])

    def set_gradient(self, flat: Tensor) -> None:
        """The opposite of flat_gradient."""
        for master, part in zip(self.tensors, flat.split([m.numel() for m in self.tensors]), strict=True):
            master.grad = part.view_as(master)

    def gradient(self, param: Tensor) -> Tensor | None:
        """What was taken of a parameter's gradient."""
        return self.by_param[id(param)].grad

    @torch.no_grad()
    def write(self) -> None:
        """The masters' values become the parameters', rounded."""
        for param, master in zip(self.params, self.tensors, strict=True):
            if master is not param:
                param.copy_(master)


class LossScale:
    """What losses are multiplied by so that fp16 gradients do not vanish (Micikevicius et al. 2018, section 3.2).

    A power of two, so that gradients which neither vanish nor overflow are the same at every scale.
    """

    START, LIMIT, PATIENCE = 2.0**16, 2.0**24, 2000

    def __init__(self, needed: bool) -> None:
        self.needed = needed
        self.value = self.START if needed else 1.0
        self.good = 0  # steps since the scale changed
        self.proven = self.value  # the scale of the last gradients that were finite

    def overflowed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these gradients are not finite and a lower scale can be tried: then they are taken away.

        At a scale of 1 there is none, and what is not finite is the caller's business.
        """
        if not self.needed:
            return False
        is_finite = bool(torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None]).isfinite())
        if not is_finite and self.value > 1:
            self.value, self.good = self.value / 2, 0
            for tensor in tensors:
                tensor.grad = None
            return True
        if is_finite:
            self.good += 1
            if self.good == self.PATIENCE:
                self.value, self.good = min(2 * self.value, self.LIMIT), 0
            self.proven = self.value
        return False

    def restore(self) -> None:
        """Gradients were not finite at any scale, which was not the scale's fault."""
        self.value = self.proven
