"""Optimizers. An elementwise one steps on all parameters in one flat tensor, another one on each as a matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lorasmith.component import Component, named

if TYPE_CHECKING:  # torch, which takes seconds: settings are read without it
    from torch import Tensor
    from torch.optim import Optimizer as Built

Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Eps = Annotated[
    float, Field(gt=0, le=1, allow_inf_nan=False, description="term added to the denominator for numerical stability")
]
WeightDecay = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


Params = Sequence["Tensor"] | Sequence[dict[str, Any]]
"""Tensors, or torch's groups of them with rates of their own."""


class _Optimizer(Component):
    """The settings of an optimizer."""

    elementwise: ClassVar[bool] = True
    """Whether a step changes each number by its own gradients alone, so that shapes do not matter."""

    def build(self, params: Params, lr: float) -> "list[Built]":
        """torch's optimizers, which step together.

        params: tensors [N] or, where it is not elementwise, matrices [n,m] and vectors [n].
        """
        raise NotImplementedError


class _Adam(_Optimizer):
    """What both kinds of Adam share."""

    beta1: Beta = Field(default=0.9, description="decay rate of the mean gradient")
    beta2: Beta = Field(default=0.999, description="decay rate of the mean squared gradient")
    eps: Eps = 1e-8


class AdamW(_Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    name: Literal["AdamW"] = "AdamW"
    weight_decay: WeightDecay = Field(
        default=0.01, description="decoupled weight decay, multiplied by the learning rate"
    )

    def build(self, params: Params, lr: float) -> "list[Built]":
        from torch import optim

        return [
            optim.AdamW(
                params, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, fused=True
            )
        ]


class Adam(_Adam):
    """Adam (Kingma and Ba 2015, algorithm 1); weight decay is added to the gradient."""

    name: Literal["Adam"] = "Adam"
    weight_decay: WeightDecay = Field(
        default=0.0, description="L2 penalty: this times the weight is added to the gradient"
    )

    def build(self, params: Params, lr: float) -> "list[Built]":
        from torch import optim

        return [
            optim.Adam(
                params, lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, fused=True
            )
        ]


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, eq. 1)."""

    name: Literal["SGD"] = "SGD"
    momentum: Beta = Field(default=0.0, description="momentum factor")
    weight_decay: WeightDecay = Field(
        default=0.0, description="L2 penalty: this times the weight is added to the gradient"
    )

    def build(self, params: Params, lr: float) -> "list[Built]":
        from torch import optim

        return [optim.SGD(params, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)]


class RMSprop(_Optimizer):
    """Gradients divided by the root of their running mean square (Hinton 2012, lecture 6e)."""

    name: Literal["RMSprop"] = "RMSprop"
    alpha: Beta = Field(default=0.99, description="decay rate of the mean squared gradient")
    momentum: Beta = Field(default=0.0, description="momentum factor")
    eps: Eps = 1e-8
    weight_decay: WeightDecay = Field(
        default=0.0, description="L2 penalty: this times the weight is added to the gradient"
    )

    def build(self, params: Params, lr: float) -> "list[Built]":
        from torch import optim

        return [
            optim.RMSprop(
                params, lr=lr, alpha=self.alpha, momentum=self.momentum, eps=self.eps, weight_decay=self.weight_decay
            )
        ]


class Muon(_Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024) for matrices, AdamW for vectors.

    Updates have the root mean square of AdamW's (Liu et al. 2025, eq. 4), so that the same rates serve.
    """

    elementwise: ClassVar[bool] = False

    name: Literal["Muon"] = "Muon"
    momentum: Beta = Field(default=0.95, description="momentum factor")
    weight_decay: WeightDecay = Field(
        default=0.01, description="decoupled weight decay, multiplied by the learning rate"
    )

    def build(self, params: Params, lr: float) -> "list[Built]":
        from torch import optim

        matrices, vectors = (_of_axes(params, number) for number in (2, 1))
        built: list[Built] = []
        if matrices:
            built.append(
                optim.Muon(
                    matrices, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
        if vectors:
            built.append(optim.AdamW(vectors, lr=lr, weight_decay=self.weight_decay))
        return built


def _of_axes(params: Params, number: int) -> list[dict[str, Any]]:
    """The groups with the tensors of so many axes, where there are some."""
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
    chosen = [{**group, "params": [p for p in group["params"] if p.ndim == number]} for group in groups]
    return [group for group in chosen if group["params"]]


OptimizerName = Literal["AdamW", "Adam", "SGD", "RMSprop", "Muon"]
Optimizer = Annotated[AdamW | Adam | SGD | RMSprop | Muon, Field(discriminator="name"), named("AdamW")]
