"""Learning-rate schedules."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lorasmith.component import Component, named

if TYPE_CHECKING:  # torch, which takes seconds: settings are read without it
    pass


Warmup = Annotated[int, Field(ge=0, le=100_000, description="warm-up steps, in which the learning rate rises from 0")]


def _warmed(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


def _progress(step: int, steps: int, warmup: int) -> float:
    """The share of the steps behind the warm-up that is done, 0 during it."""
    return max(0, step - warmup) / max(1, steps - warmup)


class Constant(Component):
    """A constant learning rate."""

    name: Literal["constant"] = "constant"
    warmup: Warmup = 0

    def factor(self, step: int, steps: int) -> float:
        """The factor of the learning rate in step 0 to steps - 1."""
        return _warmed(step, self.warmup)


class Linear(Component):
    """Linear decay."""

    name: Literal["linear"] = "linear"
    warmup: Warmup = 0
    end: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False, description="final factor of the learning rate")

    def factor(self, step: int, steps: int) -> float:
        """The factor of the learning rate in step 0 to steps - 1."""
        return _warmed(step, self.warmup) * (1 - (1 - self.end) * _progress(step, steps, self.warmup))


class Cosine(Component):
    """Cosine decay (Loshchilov and Hutter 2017, eq. 5)."""

    name: Literal["cosine"] = "cosine"
    warmup: Warmup = 0
    end: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False, description="final factor of the learning rate")

    def factor(self, step: int, steps: int) -> float:
        """The factor of the learning rate in step 0 to steps - 1."""
        fall = 0.5 * (1 + math.cos(math.pi * _progress(step, steps, self.warmup)))
        return _warmed(step, self.warmup) * (self.end + (1 - self.end) * fall)


Schedule = Annotated[Constant | Linear | Cosine, Field(discriminator="name"), named("constant")]
