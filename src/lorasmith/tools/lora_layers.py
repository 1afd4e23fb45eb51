"""The tensors of a LoRA file by layer, checked as far as that goes without a model.

r rank, k… a kernel.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lorasmith.adapters.base import Layer
from lorasmith.adapters.parts import Parts, alpha_of, fitting
from lorasmith.formats import lora_file
from lorasmith.formats.detect import lora_family
from lorasmith.formats.folding import metadata_of
from lorasmith.formats.keys import DOWN, UP, by_layer
from lorasmith.formats.lora_file import DTYPE_NAMES
from lorasmith.formats.read import refuse_strange
from lorasmith.models.sources.kind import refuse_no_lora
from lorasmith.ops.conv import ConvShape
from lorasmith.storage.safetensors import TensorFile
from lorasmith.storage.safetensors_header import Header
from lorasmith.storage.scale_names import scaled_by


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file; its tensors are views of the file, which is read where they are used."""

    path: Path  # what messages call it
    header: Header
    layers: Mapping[str, Parts]  # {layer as the file calls it: {part: tensor}}
    keys: Mapping[str, Mapping[str, str]]  # {layer: {part: the file's own key}}
    stored: Parts  # {the file's own key: tensor}, as they are in the file

    @property
    def metadata(self) -> Mapping[str, str]:
        return metadata_of(self.header)

    @classmethod
    def opened(cls, path: Path, called: Path | None = None) -> "LoRAFile":
        """ValueError where it is no sound LoRA file, or a key means nothing. called: its name in messages."""
        header = Header.of(path)
        refuse_no_lora(header)
        stored, header = lora_file.stored(path)
        layers, keys = lora_file.completed(stored, header).layers, _keys_by_layer(header)
        for layer, parts in layers.items():
            if "" in parts:
                raise ValueError(f"{path}: {layer} must name a layer and a part of an adapter, which it does not")
        return cls(called or path, header, layers, keys, stored)

    @property
    def family(self) -> str:
        return lora_family(self.layers)

    def of(self, layers: Collection[str]) -> "LoRAFile":
        """The same with these layers alone."""
        return replace(self, layers={layer: self.layers[layer] for layer in layers})

    def refuse_strange_parts(self) -> None:
        """ValueError that names parts that no algorithm knows beside the others of its layer, or of a strange dtype."""
        for layer, parts in self.layers.items():
            try:
                refuse_strange(parts)
            except ValueError as error:
                raise ValueError(f"{self.path}: {layer}: {error}") from error
            odd = [f"{p} of {t.dtype}" for p, t in sorted(parts.items()) if t.dtype not in DTYPE_NAMES]
            if odd:
                raise ValueError(f"{self.path}: {layer} must be of float64, 32 or 16 or bfloat16, got {', '.join(odd)}")

    def num_bytes(self, layers: Iterable[str]) -> int:
        """Of the tensors of some layers."""
        return sum(tensor.nbytes for layer in layers for tensor in self.layers[layer].values())

    def read(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """{layer.part: tensor} of some layers, read, where a view keeps what is seen of the file in memory."""
        found = {}
        with TensorFile(self.header) as file:
            for layer in layers:
                for part, tensor in self.layers[layer].items():
                    key = self.key(layer, part)
                    is_stored = self.stored.get(key) is tensor
                    found[f"{layer}.{part}"] = file.tensor(key) if is_stored else tensor
        return found

    def key(self, layer: str, part: str) -> str:
        """The file's own key of a part; for one that it does not hold, as kohya writes it."""
        return self.keys[layer].get(part, f"{layer}.{part}")

    def factors(self, layer: str) -> tuple[Tensor, Tensor, float]:
        """up [n_out, r] or [n_out, r, 1…], down [r, n_in] or [r, n_in, k…], and alpha / rank; ValueError if unsound."""
        try:
            return read_factors(self.layers[layer])
        except ValueError as error:
            raise ValueError(f"{self.path}: {layer}: {error}") from error


def read_factors(parts: Parts) -> tuple[Tensor, Tensor, float]:
    """up, down and alpha / rank; ValueError where they do not fit together or are not finite."""
    down = parts.get(DOWN)
    if down is None or down.ndim < 2:
        raise ValueError(f"{DOWN} must be a matrix or a kernel, got {'none' if down is None else list(down.shape)}")
    rank = len(down)
    up = parts.get(UP)
    num_out = len(up) if up is not None and up.ndim else 0
    up = fitting(parts, UP, (num_out, rank, *[1] * (down.ndim - 2)))
    return up, fitting(parts, DOWN, tuple(down.shape)), alpha_of(parts, rank) / rank


def _keys_by_layer(header: Header) -> dict[str, dict[str, str]]:
    """{layer: {part: the file's own key}}, but for keys that name their layer in another way than it is called here."""
    own = {key: key for key in header.shapes if scaled_by(key, header.shapes) is None}
    keys: dict[str, dict[str, str]] = cast(Any, by_layer(cast(Any, own)))
    return {layer: {p: key for p, key in parts.items() if key.startswith(layer)} for layer, parts in keys.items()}


def layer_of(n_out: int, n_in: int, kernel: tuple[int, ...]) -> Layer:
    """A layer of these sizes; what else a convolution has does not matter for its weight."""
    ones = (1,) * len(kernel)
    return Layer(n_in, n_out, kernel, ConvShape(ones, (0,) * len(kernel), ones, 1) if kernel else None)
