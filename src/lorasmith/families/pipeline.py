"""What families share that are pipelines of diffusers: their parts, flow, autoencoder and texts.

B batch, C channels, h w latent sides, H W pixels.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorasmith.families.components import Components, OpenComponents
from lorasmith.families.texts import Texts
from lorasmith.noise import Flow, TokenShift
from lorasmith.types import Codec, Cond, Denoiser

log = logging.getLogger(__name__)


class PipelineFamily:
    """A family: components -> denoiser, codec, and a pipeline around a changed denoiser."""

    ENCODERS: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    """The parts that turn pictures and captions into latents and conditioning."""
    TEXTS: ClassVar[Texts | None] = None
    """How its text encoders are trained; None: not at all."""

    def __init__(self, components: Components) -> None:
        """ValueError where a part is missing or of another kind."""
        self.components = components
        self.denoiser = self.denoiser_of(components)

    def denoiser_of(self, components: Components) -> Denoiser:
        raise NotImplementedError

    def codec_of(self, pipe: Any) -> Codec:
        raise NotImplementedError

    def codec(self, device: torch.device) -> Codec:
        """The encoders on this device, the autoencoder in float32; those of an open pipeline as it holds them."""
        pipe = self.components.pipeline(self.denoiser.nets)
        missing = [name for name in self.ENCODERS if getattr(pipe, name, None) is None]
        if missing:
            raise ValueError(f"model must hold {' and '.join(missing)} to encode captions, but it does not")
        if not isinstance(self.components, OpenComponents):
            pipe.vae.float()
            for name in self.ENCODERS:
                getattr(pipe, name).to(device)
        return self.codec_of(pipe)

    def pipeline(self, denoiser: Denoiser) -> Any:
        """A diffusers pipeline that predicts with this copy of the denoiser; the source's own stays as it is."""
        weights = next(iter(denoiser.nets.values())).parameters()
        widest = max(weights, key=lambda weight: weight.numel())  # small ones may be kept in float32
        return self.components.pipeline(denoiser.nets, widest.dtype)

    def metadata(self) -> dict[str, str]:
        """What other tools read of a base model: modelspec and kohya's keys."""
        raise NotImplementedError


class PictureCodec:
    """The encoders of a pipeline whose autoencoder is an AutoencoderKL."""

    PATCH: ClassVar[int] = 2
    """Latent pixels along a token's side."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.vae = pipe, pipe.vae
        self.factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        self.multiple = self.factor * self.PATCH
        self.resolution: int = pipe.default_sample_size * self.factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        width, height = size
        return (self.vae.config["latent_channels"], height // self.factor, width // self.factor)

    def encode_images(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in -1 to 1 -> the posterior's mean, shifted and scaled: [B,C,h,w], float32."""
        mean = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (mean.float() - self._shift) * self.vae.config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w] -> images [B,3,H,W] in about -1 to 1, float32."""
        latents = latents / self.vae.config["scaling_factor"] + self._shift
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample.float()

    @property
    def _shift(self) -> float:
        return self.vae.config["shift_factor"] or 0.0

    def encode_texts(self, texts: Sequence[str]) -> Cond:
        raise NotImplementedError


def dtype_of(net: nn.Module) -> torch.dtype:
    """What a net's inputs must be; its first parameter's, as diffusers' own property walks all modules."""
    return next(net.parameters()).dtype


def flow_of(scheduler: Mapping[str, Any], patch: int = 2) -> Flow:
    """The flow of a scheduler's config, with its shift, be it one for all sizes or by the number of tokens."""
    if scheduler.get("use_dynamic_shifting"):
        if scheduler.get("time_shift_type", "exponential") != "exponential":
            raise ValueError(f"time_shift_type must be exponential, got {scheduler['time_shift_type']!r}")
        few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        slope = (high - low) / (many - few)
        return Flow(by_size=TokenShift(low - slope * few, slope, patch))
    return Flow(float(scheduler.get("flow_shift", scheduler.get("shift", 1.0))))


def warn_of_cuts(texts: Sequence[str], tokenizer: Any, length: int) -> None:
    """Logs which texts are longer than the tokens that are read of them."""
    for text in texts:
        num_tokens = len(tokenizer(text).input_ids)
        if num_tokens > length:
            log.warning("only the first %d of %d tokens are read of %r", length, num_tokens, text[:60])


def packed(latents: Tensor) -> Tensor:
    """latents [B,C,h,w] -> tokens [B,h/2 w/2,4C], each a square of 2 x 2; ValueError where a side is odd."""
    batch, channels, height, width = latents.shape
    if height % 2 or width % 2:
        raise ValueError(f"latents must have even sides for this model, got {[height, width]}")
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The opposite: tokens [B,h/2 w/2,4C] -> latents [B,C,h,w]."""
    batch, _, channels = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def check_inputs(x_t: Tensor, cond: Cond, *, channels: int, widths: Mapping[str, int], axes: str = "h,w") -> None:
    """ValueError where latents [B,C,*axes] or conditioning of these widths are another model's."""
    if x_t.ndim != 2 + len(axes.split(",")) or x_t.shape[1] != channels:
        raise ValueError(f"latents must be [N,{channels},{axes}] for this model, got {[len(x_t), *x_t.shape[1:]]}")
    for name, width in widths.items():
        if name not in cond or cond[name].shape[-1] != width:
            shape = f"[L,{width}]" if name == "text" else f"[{width}]"
            found = f"width {cond[name].shape[-1]}" if name in cond else f"only {', '.join(cond) or 'nothing'}"
            raise ValueError(f"positive must hold {name} {shape} for this model, got {found}")
