"""A layer as adapters see it, and what an adapter is; what they may ask of a weight is in `frozen_weight.py`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorasmith.adapters.parts import OFFSETS, Parts
from lorasmith.ops.conv import ConvShape

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A linear layer (conv None) or a convolution of any number of axes."""

    n_in: int
    n_out: int
    kernel: tuple[int, ...] = ()
    conv: ConvShape | None = None

    @property
    def groups(self) -> int:
        return 1 if self.conv is None else self.conv.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(n_out, n_in / groups, *kernel)."""
        return (self.n_out, self.n_in // self.groups, *self.kernel)

    @property
    def fan_in(self) -> int:
        """How many numbers each output is a sum over."""
        return math.prod(self.weight_shape[1:])

    def is_cheaper_in_two(self, rank: int) -> bool:
        """Whether two products, with factors of this rank, take fewer multiplications than one with their product."""
        return rank * (self.groups * self.fan_in + self.n_out) < self.fan_in * self.n_out

    @classmethod
    def of(cls, path: str, module: nn.Module) -> "Layer":
        """The sizes of a module of one of the ADAPTABLE kinds; ValueError where its padding is not plain zeros."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features)
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d), type(module)
        if module.padding_mode != "zeros":
            raise ValueError(f"{path}: convolutions must pad with zeros to be adapted, got {module.padding_mode!r}")
        conv = ConvShape(module.stride, _padding(path, module), module.dilation, module.groups)
        return cls(module.in_channels, module.out_channels, module.kernel_size, conv)


def _padding(path: str, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """The zeros added on either side of each axis."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(r % 2 for r in reach):
        raise ValueError(f"{path}: padding 'same' must be even to be adapted, got a kernel of {module.kernel_size}")
    return tuple(r // 2 for r in reach)


@dataclass(frozen=True)
class Member:
    """A linear layer that is part of another in the original code, and what a file holds for it."""

    base: nn.Module
    parts: Parts = field(default_factory=dict)

    @property
    def rows(self) -> int:
        assert isinstance(self.base.weight, Tensor)
        return self.base.weight.shape[0]

    def zeros(self, part: str) -> Tensor:
        """An offset that changes nothing; ValueError where there is no such parameter."""
        parameter = dict(self.base.named_parameters(recurse=False)).get(OFFSETS[part])
        if parameter is None:
            raise ValueError(f"{part} must hold rows for each part of a layer, but one has no {OFFSETS[part]}")
        return torch.zeros(parameter.shape, dtype=torch.float32)


class Adapter(nn.Module, ABC):
    """An adapter of one layer, whose parameters are what is trained.

    Its class is an algorithm and states all that the program knows of it; what most of them are is stated here.
    """

    algorithm: ClassVar[str]
    MARKS: ClassVar[frozenset[str]]
    """The parts in a file that show the algorithm."""
    SUFFIXES: ClassVar[frozenset[str]]
    """All parts that it reads."""
    EXTENDS: ClassVar["type[Adapter] | None"] = None
    """The algorithm whose parts stand beside its own."""

    RANKED: ClassVar[Mapping[str, int]] = {}
    """{a part: its axis that is as long as the rank}."""
    RANK_WORDS: ClassVar[str] = ""
    """What stands before the rank where a file is described."""
    SCALED_BY_RANK: ClassVar[bool] = True
    """Whether alpha / rank scales it, so that a file without an alpha leaves a question open."""
    PEFT_SCALES: ClassVar[str | None] = None
    """The part that PEFT's scale belongs to where nothing has a rank."""
    CORES: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """{a core of Tucker's form: the factors that it stands between, up and down}."""
    BY_OUTPUT: ClassVar[frozenset[str]]
    """The parts whose rows are in the order of the layer's outputs."""
    IN_FLOAT32: ClassVar[frozenset[str]] = frozenset({"alpha"})
    """The parts that are stored in float32, whatever dtype is asked for."""

    IS_ADDITIVE: ClassVar[bool] = True
    """Whether it adds a delta that does not depend on the weight."""
    IS_LOW_RANK: ClassVar[bool] = False
    """Whether its factors are one lora_up and lora_down, which can be cut to a smaller rank."""
    NEEDS_WEIGHT: ClassVar[bool] = False
    """Whether it reads the layer's weight."""
    NEEDS_BIAS: ClassVar[bool] = False
    """Whether it reads the layer's bias, without running the layer."""

    KOHYA_MODULE: ClassVar[str | None] = None
    """kohya's own code that trains it; None: LyCORIS's."""
    LYCORIS_ARGS: ClassVar[Mapping[str, str]]
    """The arguments that LyCORIS's users give for it."""
    DIFFUSERS_READS: ClassVar[bool | frozenset[str]] = False
    """Whether diffusers reads it, or for which of its classes."""
    DEPENDS_ON_LAYOUT: ClassVar[bool] = False
    """Whether its numbers, not its names alone, are others for ComfyUI."""
    CAN_FUSE: ClassVar[bool] = True
    """Whether those of several layers can be one of the layer that they are in the original code."""
    COMFYUI_BYPASS: ClassVar[bool] = True
    """Whether ComfyUI computes it beside the weights, of every kind of layer."""

    takes_base: ClassVar[bool]
    """Whether it may be given a layer that is yet to run instead of its output: it only adds to that."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The rank that its tensors show; None where nothing is decomposed."""

    @property
    @abstractmethod
    def alpha(self) -> float | None:
        """None where the algorithm has none that counts."""

    @classmethod
    @abstractmethod
    def from_file(cls, layer: Layer, tensors: Parts, base: nn.Module | None = None) -> "Adapter":
        """The adapter that a file holds for this layer; ValueError where it does not fit.

        base: the layer's module, for those that need its weight.
        """

    @abstractmethod
    def forward(self, x: Tensor, y: Any, bias: Tensor | None = None, base: nn.Module | None = None) -> Tensor:
        """x, the layer's input, y, its output, its bias, and itself -> adapted y, in y's shape and dtype.

        base is for those that ask the layer's weight (`adapters/frozen_weight.py`); the others may be run without.
        """

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight [n_out, n_in / g, k…], which DoRA was made with -> with the adapter in it, float32."""

    @abstractmethod
    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """{part in a file: tensor}, weights in this dtype."""

    def restore(self, stated: Mapping[str, Any]) -> None:
        """Takes back from the settings that a file states what its tensors do not say; most say everything."""

    @classmethod
    @abstractmethod
    def delta_norm(cls, parts: Parts) -> float:
        """The Frobenius norm of what the parts add; KeyError, ValueError and others where they do not fit together."""

    @classmethod
    @abstractmethod
    def layer_sizes(cls, parts: Parts) -> tuple[int, int, tuple[int, ...] | None] | None:
        """The outputs, inputs and kernel of the layer that the parts are for; None where they do not say.

        Where the kernel is None, which the parts do not say either, the inputs are times its numbers.
        """

    @classmethod
    @abstractmethod
    def fuse(cls, members: Sequence[Member]) -> dict[str, Tensor]:
        """The parts of the layer that several make, of which one has some at least; ValueError where none can be."""

    @classmethod
    @abstractmethod
    def split(cls, parts: Parts, members: Sequence[Member]) -> list[dict[str, Tensor]]:
        """What each of several layers has of the whole's parts, nothing where that changes nothing; ValueError."""

    @classmethod
    @abstractmethod
    def to_peft(cls, parts: Parts) -> dict[str, Tensor] | None:
        """The parts under PEFT's names, with what they are scaled by in them; None where PEFT has no such thing."""

    @classmethod
    def is_read_by_diffusers(cls, classes: Collection[str]) -> bool:
        """Whether diffusers reads it for a model of one of its classes."""
        reads = cls.DIFFUSERS_READS
        return reads if isinstance(reads, bool) else not reads.isdisjoint(classes)

    @classmethod
    def rank_of(cls, parts: Parts) -> int | None:
        """The rank that parts of a file show."""
        axes = ((parts[part], axis) for part, axis in cls.RANKED.items() if part in parts)
        return next((tensor.shape[axis] for tensor, axis in axes if tensor.ndim), None)


def normal(name: str) -> str:
    """A layer's name as readers of files compare it."""
    return name.replace(".", "_")
