"""The weights of a skeleton's layers, read from a model's files where they are asked for, one at a time.

The layer's name says where they are: diffusers' name, or the original one, of which the layer may be some rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_weight import Absent, NoWeights
from lorasmith.adapters.targets import adaptable_layers
from lorasmith.formats.module_names import known_originals
from lorasmith.storage.safetensors import TensorFile
from lorasmith.tools.model_files import Model
from lorasmith.types import Denoiser

COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def with_stored_weights(denoiser: Denoiser, path: Path | None) -> Denoiser:
    """Makes the weights of a skeleton's layers ones that are read where they are asked for; returns the denoiser.

    path: the folder or single file that holds them; None: whoever asks gets NoWeights.
    """
    stored = None if path is None else Stored(denoiser, path)
    for layer, module in adaptable_layers(denoiser.nets).items():
        assert isinstance(module.weight, Tensor)
        module.weight = Absent(module.weight.data, requires_grad=False)
        module.weight.read = partial(_none, layer) if stored is None else partial(stored.weight, layer, module)
    return denoiser


def _none(layer: str) -> Tensor:
    raise NoWeights(layer)


class Rows(NamedTuple):
    """Where a layer's weight may be: rows of a module's."""

    module: str  # as a LoRA would name it
    begin: int = 0
    swapped: bool = False  # whether its halves come the other way round


@dataclass(frozen=True)
class Stored:
    """The files of the model that a skeleton is of."""

    denoiser: Denoiser
    path: Path

    @cached_property
    def model(self) -> Model:
        return Model.opened(self.path)

    def weight(self, layer: str, module: nn.Module) -> Tensor:
        """A layer's weight; ValueError where it is not there, of another shape, or quantised."""
        shape = _shape(module)
        for rows in self._places(layer):
            tensor = self._read(rows)
            if tensor is not None:
                part = tensor[rows.begin : rows.begin + shape[0]]
                if part.numel() != shape.numel():
                    raise ValueError(
                        f"{layer} of {self.path} must have a weight of {list(shape)}, got {list(part.shape)}"
                    )
                return part.reshape(shape)
        for part, header in self.model.files:
            if part in ("", layer.partition(".")[0]):
                self.model.quantised[header.path].check(header.path)
        raise ValueError(f"{self.path} must hold the weight of {layer}, whose lengths DoRA changes, but it does not")

    def _places(self, layer: str) -> Iterator[Rows]:
        yield Rows(self.denoiser.file_key(layer))
        net, _, path = layer.partition(".")
        for original in known_originals(self.denoiser.nets[net]):
            if path in original.paths:
                before = original.paths[: original.paths.index(path)]
                begin = sum(_shape(self.denoiser.nets[net].get_submodule(member))[0] for member in before)
                yield Rows(original.name, begin, original.swapped)

    def _read(self, rows: Rows) -> Tensor | None:
        """The module's whole weight, the widest where a folder holds variants."""
        place = self.model.place(rows.module)
        headers = [] if place is None else list(self.model.headers(place, "weight"))
        if place is None or not headers:
            return None
        key = place.key("weight")
        header = max(headers, key=lambda header: header.num_bytes(key))
        with TensorFile(header) as file:
            tensor = place.within(self.model.read(file, key).value)
        if tensor.dtype not in COMPUTED:
            tensor = tensor.to(torch.bfloat16)  # which holds the numbers of fp8 exactly
        return torch.cat(tensor.chunk(2)[::-1]) if rows.swapped else tensor


def _shape(module: nn.Module) -> torch.Size:
    """Of its weight."""
    assert isinstance(module.weight, Tensor)
    return module.weight.shape
