"""Distributions that timesteps are drawn from."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lorasmith.component import Component, named

if TYPE_CHECKING:  # torch, which takes seconds: settings are read without it
    from torch import Tensor


class Uniform(Component):
    """Uniform timesteps."""

    name: Literal["uniform"] = "uniform"

    def fraction(self, u: "Tensor") -> "Tensor":
        """u [B], uniform in [0, 1) -> the distribution's quantile [B] in [0, 1]."""
        return u


class LogitNormal(Component):
    """Logit-normal timesteps: those in the middle are more frequent (Esser et al. 2024, section 3.1)."""

    name: Literal["logit_normal"] = "logit_normal"
    mean: float = Field(
        default=0.0, ge=-10, le=10, allow_inf_nan=False, description="mean of the logit; above 0: noisier timesteps"
    )
    std: float = Field(default=1.0, gt=0, le=10, allow_inf_nan=False, description="standard deviation of the logit")

    def fraction(self, u: "Tensor") -> "Tensor":
        """u [B], uniform in [0, 1) -> the distribution's quantile [B] in [0, 1]."""
        return (self.mean + self.std * math.sqrt(2) * (2 * u - 1).erfinv()).sigmoid()


Times = Annotated[Uniform | LogitNormal, Field(discriminator="name"), named("uniform")]
