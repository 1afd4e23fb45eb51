"""What a configurable part is: a frozen model with its fields and their ranges, chosen among its kind by `name`.

A kind is registered as a union: `Loss = Annotated[MSE | L1, Field(discriminator="name"), named("MSE")]`.
"""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Component(BaseModel):
    """A part that is its own config; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def named(default: str) -> BeforeValidator:
    """Lets a part be given by its name alone, or by its fields alone (then it is the default one)."""

    def spelt_out(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict):
            return {"name": default, **value}
        return value

    return BeforeValidator(spelt_out)
