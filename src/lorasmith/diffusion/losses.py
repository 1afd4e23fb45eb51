"""Losses: how far a prediction is from its target, by element, and their mean by sample."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lorasmith.component import Component, named

if TYPE_CHECKING:  # torch, which takes seconds: settings are read without it
    from torch import Tensor


Threshold = Annotated[
    float,
    Field(gt=0, le=1e6, allow_inf_nan=False, description="difference at which the loss turns from quadratic to linear"),
]


class MSE(Component):
    """(pred - target)^2."""

    name: Literal["MSE"] = "MSE"

    def elementwise(self, pred: "Tensor", target: "Tensor") -> "Tensor":
        """pred, target [B,…] -> [B,…]."""
        from torch.nn import functional as F

        return F.mse_loss(pred, target, reduction="none")


class L1(Component):
    """|pred - target|."""

    name: Literal["L1"] = "L1"

    def elementwise(self, pred: "Tensor", target: "Tensor") -> "Tensor":
        """pred, target [B,…] -> [B,…]."""
        from torch.nn import functional as F

        return F.l1_loss(pred, target, reduction="none")


class Huber(Component):
    """Half the square below delta, delta (|d| - delta / 2) above (Huber 1964)."""

    name: Literal["Huber"] = "Huber"
    delta: Threshold = 1.0

    def elementwise(self, pred: "Tensor", target: "Tensor") -> "Tensor":
        """pred, target [B,…] -> [B,…]."""
        from torch.nn import functional as F

        return F.huber_loss(pred, target, reduction="none", delta=self.delta)


class SmoothL1(Component):
    """Huber's loss divided by beta (Girshick 2015, eq. 3)."""

    name: Literal["SmoothL1"] = "SmoothL1"
    beta: Threshold = 1.0

    def elementwise(self, pred: "Tensor", target: "Tensor") -> "Tensor":
        """pred, target [B,…] -> [B,…]."""
        from torch.nn import functional as F

        return F.smooth_l1_loss(pred, target, reduction="none", beta=self.beta)


Loss = Annotated[MSE | L1 | Huber | SmoothL1, Field(discriminator="name"), named("MSE")]


def by_sample(loss: Loss, pred: "Tensor", target: "Tensor") -> "Tensor":
    """pred, target [B,…] -> the mean over each sample's elements [B], float32."""
    return loss.elementwise(pred.float(), target.float()).flatten(1).mean(1)
