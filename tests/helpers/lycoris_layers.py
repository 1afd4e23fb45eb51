"""LyCORIS's own layers, made from files."""

from typing import Any

from lycoris.modules import get_module, make_module
from torch import Tensor


def lycoris_layer(file: dict[str, Tensor], name: str, layer: Any) -> Any:
    """What LyCORIS makes of a file's tensors for the layer of this name."""
    kind, tensors = get_module(file, name)
    assert kind is not None
    return make_module(kind, tensors, name, layer)
