"""The data types of a training, and the protocols between its parts.

B batch, C channels, h w latent height and width (video adds a frame axis before them), H W those of the image,
L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:  # torch takes seconds, and settings are read without it
    from torch import Tensor, nn

DtypeName = Literal["bf16", "fp32"]
TrainingDtypeName = Literal["bf16", "fp32", "none"]
BaseDtypeName = Literal["none", "int8", "fp8", "nf4"]
LayoutName = Literal["kohya", "diffusers", "comfyui", "lycoris"]

Cond: TypeAlias = "dict[str, Tensor]"
"""Conditioning by name: "text" is the token sequence [L,D] ([B,L,D] in a batch), "pooled" a vector [D] ([B,D]).

With a "mask" [L], 1 for a token and 0 for padding, texts of different lengths can share a batch.
"""


@dataclass(frozen=True)
class Example:
    """One picture of a data set, not read yet."""

    image_path: Path
    caption: str
    repeats: int = 1


@dataclass(frozen=True)
class Cached:
    """One encoded sample."""

    name: str
    latent: Tensor  # [C,h,w] or [C,f,h,w], float32, scaled as the model expects
    cond: Cond  # {name: [L,D] or [D]}


@dataclass(frozen=True)
class Batch:
    """Samples of one shape."""

    x0: Tensor  # [B,C,h,w] or [B,C,f,h,w]
    cond: Cond  # {name: [B,L,D] or [B,D]}
    numbers: tuple[int, ...]  # the samples' global numbers, which determine their noise and timesteps
    names: tuple[str, ...]  # the samples' names, for messages

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, start: int, stop: int) -> Batch:
        """The samples start to stop - 1."""
        cond = {name: value[start:stop] for name, value in self.cond.items()}
        return Batch(self.x0[start:stop], cond, self.numbers[start:stop], self.names[start:stop])


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step."""

    step: int  # steps completed, including this one and those of a continued LoRA
    loss: float  # mean over the samples of the step
    lr: float
    grad_norm: float  # of all adapter gradients together, before clipping
    seconds: float


class Result(NamedTuple):
    """The four outputs of train_lora."""

    model_with_lora: Any  # like the input: a diffusers pipeline (also for a path) or a Denoiser
    lora: dict[str, Tensor]
    loss: dict[str, list[float]]
    steps: int


class Process(Protocol):
    """How noise is added and what the net predicts; t [B] is in the process's own units."""

    def time(self, fraction: Tensor) -> Tensor:
        """fraction [B] in [0, 1), 0 is the cleanest -> t [B]."""
        ...

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x0, eps [B,…] -> x_t [B,…]."""
        ...

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The target of the net's output for x_t [B,…]."""
        ...

    def x0(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The clean latents [B,…] implied by the net's output [B,…]."""
        ...

    def eps(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The noise [B,…] implied by the net's output [B,…]."""
        ...

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio [B]: the squared ratio of the factors of x0 and eps."""
        ...


@runtime_checkable
class SizedProcess(Process, Protocol):
    """A process whose timesteps depend on the size of the latents."""

    def sized(self, shape: Sequence[int]) -> Process:
        """The process for latents [C,h,w] or [C,f,h,w] of this shape."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """The model in the training loop. It must support copy.deepcopy: a copy that shares the weights is trained."""

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        """The nets that can get adapters, by name; a layer's path is "<net>.<module path>"."""
        ...

    @property
    def process(self) -> Process: ...

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,h,w], t [B], cond {name: [B,…]} -> the net's raw output [B,C,h,w], float32."""
        ...

    def file_key(self, path: str) -> str:
        """A layer's path -> its key in a LoRA file, without the suffix."""
        ...


def process_of(denoiser: Denoiser, shape: Sequence[int]) -> Process:
    """The noise process for latents of this shape, [C,h,w] or [C,f,h,w]."""
    process = denoiser.process
    return process.sized(shape) if isinstance(process, SizedProcess) else process


@runtime_checkable
class Encoding(Protocol):
    """A denoiser that encodes captions itself: its conditioning contains their tokens."""

    @property
    def inner(self) -> Denoiser:
        """The denoiser that takes encoded captions."""
        ...

    def encoded(self, cond: Cond) -> Cond:
        """{name: [B,…]} with tokens -> conditioning of the inner denoiser."""
        ...


@runtime_checkable
class Guided(Protocol):
    """A guidance-distilled denoiser: guidance is an input of its net."""

    def guided(self, cond: Cond, guidance: float) -> Cond:
        """Conditioning {name: [B,…]} with the guidance."""
        ...


@runtime_checkable
class Routed(Protocol):
    """A denoiser that routes each sample to one of its nets."""

    def routes(self, t: Tensor) -> Sequence[str]:
        """t [B] -> the name of each sample's net."""
        ...


@runtime_checkable
class Aliased(Protocol):
    """A denoiser that knows other programs' names of its layers in LoRA files."""

    def aliases(self) -> Mapping[str, str]:
        """{a layer's name in a file, without the suffix: its path}."""
        ...


@runtime_checkable
class PartlyRead(Protocol):
    """A denoiser whose nets do not use some outputs, such as those for the text in the last block."""

    def unread(self) -> Collection[str]:
        """The paths of the layers whose outputs no prediction depends on, where an adapter would learn nothing."""
        ...


@runtime_checkable
class Divided(Protocol):
    """A denoiser whose nets are separate models in other programs, each with its own LoRA file."""

    def experts(self) -> Mapping[str, Denoiser]:
        """{an expert's name: a denoiser of only that net}."""
        ...


def unread(denoiser: Denoiser) -> Collection[str]:
    """The paths of the layers that no prediction depends on."""
    return denoiser.unread() if isinstance(denoiser, PartlyRead) else ()


class Codec(Protocol):
    """A model's autoencoder and text encoders."""

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this, in pixels."""
        ...

    @property
    def resolution(self) -> int:
        """The side of the square images the model was trained on, in pixels."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(W, H) in pixels -> (C, h, w)."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in -1 to 1 -> latents [B,C,h,w], float32, scaled as the model expects; without gradients."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {name: [B,…]}, float32; without gradients."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w], scaled as the model expects -> images [B,3,H,W] in -1 to 1, float32."""
        ...


@runtime_checkable
class SizeCodec(Protocol):
    """A codec of a model conditioned on the image size and crop (Podell et al. 2023, section 2.2)."""

    def encode_size(self, original: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> Cond:
        """(W, H) of the original image, (x, y) of the crop in the scaled image, and (W, H) of the crop."""
        ...
