"""The types that the data flows through, and the protocols at the seams.

B batch, C channels, h w latent height and width (video adds a frame axis before them), H W the picture's,
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

Where there is a "mask" [L], 1 for a token that is read and 0 for padding, texts of several lengths go into one batch.
"""


@dataclass(frozen=True)
class Example:
    """One picture of a data set, as files: nothing is read yet."""

    image_path: Path
    caption: str
    repeats: int = 1


@dataclass(frozen=True)
class Cached:
    """One sample, encoded: what training reads."""

    name: str
    latent: Tensor  # [C,h,w] or [C,f,h,w], float32, in the model's own scale
    cond: Cond  # {name: [L,D] or [D]}


@dataclass(frozen=True)
class Batch:
    """Samples of one shape."""

    x0: Tensor  # [B,C,h,w] or [B,C,f,h,w]
    cond: Cond  # {name: [B,L,D] or [B,D]}
    numbers: tuple[int, ...]  # the samples' global numbers, which their noise and times are drawn from
    names: tuple[str, ...]  # the samples' names, for messages

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, start: int, stop: int) -> Batch:
        """The samples start to stop - 1."""
        cond = {name: value[start:stop] for name, value in self.cond.items()}
        return Batch(self.x0[start:stop], cond, self.numbers[start:stop], self.names[start:stop])


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int  # steps completed, this one included and those of a continued LoRA too
    loss: float  # mean over the group's samples
    lr: float
    grad_norm: float  # of all adapter gradients together, before clipping
    seconds: float


class Result(NamedTuple):
    """The contract's four outputs."""

    model_with_lora: Any  # of the kind that came in: a diffusers pipeline (for a path too) or a Denoiser
    lora: dict[str, Tensor]
    loss: dict[str, list[float]]
    steps: int


class Process(Protocol):
    """How noise is added and what the net predicts; t [B] is in the process's own unit."""

    def time(self, fraction: Tensor) -> Tensor:
        """fraction [B] in [0, 1), 0 the cleanest -> t [B]."""
        ...

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x0, eps [B,…] -> x_t [B,…]."""
        ...

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the net should return for x_t [B,…]."""
        ...

    def x0(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The clean latents [B,…] that a net's output [B,…] implies."""
        ...

    def eps(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The noise [B,…] that a net's output [B,…] implies."""
        ...

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise ratio [B]: the square of the factor of x0 over that of eps."""
        ...


@runtime_checkable
class SizedProcess(Process, Protocol):
    """A process whose times depend on the latents' size."""

    def sized(self, shape: Sequence[int]) -> Process:
        """The process for latents [C,h,w] or [C,f,h,w] of this shape."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A model as the loop sees it. It must survive copy.deepcopy: training works on a copy that shares the weights."""

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        """The nets that can carry adapters, by name; a layer's path is "<net>.<module path>"."""
        ...

    @property
    def process(self) -> Process: ...

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,h,w], t [B], cond {name: [B,…]} -> the net's raw output [B,C,h,w], float32."""
        ...

    def file_key(self, path: str) -> str:
        """A layer's path -> its name in a LoRA file, without the suffix."""
        ...


def process_of(denoiser: Denoiser, shape: Sequence[int]) -> Process:
    """How noise is added to latents of this shape, [C,h,w] or [C,f,h,w]."""
    process = denoiser.process
    return process.sized(shape) if isinstance(process, SizedProcess) else process


@runtime_checkable
class Encoding(Protocol):
    """A denoiser that encodes captions itself, so that its conditioning holds their tokens."""

    @property
    def inner(self) -> Denoiser:
        """The denoiser of what is encoded."""
        ...

    def encoded(self, cond: Cond) -> Cond:
        """{name: [B,…]} with tokens -> what the inner denoiser is given."""
        ...


@runtime_checkable
class Guided(Protocol):
    """A denoiser whose net is told the guidance, as it was distilled from guided predictions."""

    def guided(self, cond: Cond, guidance: float) -> Cond:
        """Conditioning {name: [B,…]} that states the guidance too."""
        ...


@runtime_checkable
class Routed(Protocol):
    """A denoiser that sends a sample to one of its nets alone."""

    def routes(self, t: Tensor) -> Sequence[str]:
        """t [B] -> the name of each sample's net."""
        ...


@runtime_checkable
class Aliased(Protocol):
    """A denoiser that knows how other programs call its layers in LoRA files."""

    def aliases(self) -> Mapping[str, str]:
        """{a layer's name in a file, without the suffix: its path}."""
        ...


@runtime_checkable
class PartlyRead(Protocol):
    """A denoiser whose nets throw some outputs away, as those of the text in the last block."""

    def unread(self) -> Collection[str]:
        """The paths of the layers whose outputs reach no prediction, so that an adapter there learns nothing."""
        ...


@runtime_checkable
class Divided(Protocol):
    """A denoiser whose nets are models of their own to other programs, each with a LoRA file of its own."""

    def experts(self) -> Mapping[str, Denoiser]:
        """{an expert's name: the denoiser that it is alone, of one of this one's nets}."""
        ...


def unread(denoiser: Denoiser) -> Collection[str]:
    """The paths of the layers that no prediction depends on."""
    return denoiser.unread() if isinstance(denoiser, PartlyRead) else ()


class Codec(Protocol):
    """A model's own encoders."""

    @property
    def multiple(self) -> int:
        """Pictures' sides must be multiples of this, in pixels."""
        ...

    @property
    def resolution(self) -> int:
        """The side of the square pictures that the model was made for, in pixels."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(W, H) in pixels -> (C, h, w)."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in -1 to 1 -> latents [B,C,h,w], float32, in the model's own scale; without gradients."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {name: [B,…]}, float32; without gradients."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w] in the model's own scale -> images [B,3,H,W] in -1 to 1, float32."""
        ...


@runtime_checkable
class SizeCodec(Protocol):
    """A codec of a model that is told a picture's size, and how it was cropped (Podell et al. 2023, section 2.2)."""

    def encode_size(self, original: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> Cond:
        """(W, H) of the picture as it was, (x, y) of the crop in the scaled picture, and (W, H) of the crop."""
        ...
