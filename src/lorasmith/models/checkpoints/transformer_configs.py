"""What the shapes of a transformer's tensors, under diffusers' names, are told by, for the families that read them."""

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""{name of a tensor: its shape}."""
Config = Mapping[str, Any]


def num_blocks(shapes: Shapes, prefix: str) -> int:
    """How many numbered blocks there are: `prefix0.`, `prefix1.` …"""
    return len({key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)})


def holds(shapes: Shapes, part: str) -> bool:
    """Whether a tensor has this in its name."""
    return any(part in key for key in shapes)
