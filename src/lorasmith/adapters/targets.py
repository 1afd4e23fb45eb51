"""Which layers of a net can carry an adapter, and which of them do."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lorasmith.component import Component

if TYPE_CHECKING:  # torch, which takes seconds: settings are read without it
    from torch import nn

ATTENTION = r"(^|[._])(attn\d*|attention)\."
MLP = r"(^|[._])(ff(_context)?|ffn|mlp|feed_forward)\."
PRESETS = {"attention": (ATTENTION,), "attention+mlp": (ATTENTION, MLP), "all": ("",), "none": ()}


TEXT_NETS = "text_encoder"
"""What the names of text encoders begin with, among a denoiser's nets."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error}), got {pattern!r}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class Targets(Component):
    """The layers that get an adapter: those of the preset and of `include`, without those of `exclude`.

    Where `include` is given without a preset, it chooses alone.
    """

    preset: Literal["attention", "attention+mlp", "all", "none"] = Field(
        default="attention+mlp",
        description="attention layers, attention and MLP layers, or all linear layers and convolutions; none if only "
        "include is set",
    )
    include: tuple[Pattern, ...] = Field(
        default=(),
        description="regular expressions for layer paths: only these layers, or, with a preset, these in addition",
    )
    exclude: tuple[Pattern, ...] = Field(default=(), description="regular expressions for layer paths to exclude")

    @model_validator(mode="before")
    @classmethod
    def _only_included(cls, values: Any) -> Any:
        is_alone = isinstance(values, dict) and values.get("include") and "preset" not in values
        return {**values, "preset": "none"} if is_alone else values

    def matches(self, path: str) -> bool:
        wanted = (*PRESETS[self.preset], *self.include)
        return any(re.search(p, path) for p in wanted) and not any(re.search(p, path) for p in self.exclude)

    def idle(self, paths: Iterable[str]) -> list[str]:
        """The patterns of include and exclude that match none of these paths, each with its setting."""
        known = list(paths)
        patterns = [*(("include", p) for p in self.include), *(("exclude", p) for p in self.exclude)]
        return [f"targets.{key} {p!r}" for key, p in patterns if not any(re.search(p, path) for path in known)]


def adaptable_layers(nets: "Mapping[str, nn.Module]") -> "dict[str, nn.Module]":
    """{path: module} of every layer that could carry an adapter; a path is "<net>.<module path>"."""
    from lorasmith.adapters.base import ADAPTABLE

    return {
        f"{name}.{path}": module
        for name, net in nets.items()
        for path, module in net.named_modules()
        if isinstance(module, ADAPTABLE)
    }
