"""What families share that are pipelines of diffusers: their parts, flow, autoencoder and texts.

B batch, C channels, f h w latent frames and sides, F H W frames and pixels, L tokens.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lorasmith.diffusion.process import Flow, TokenShift
from lorasmith.models.sources.components import Components, OpenComponents
from lorasmith.models.sources.folder_layout import MODULES
from lorasmith.models.text_encoders import Texts, output_of, tokens, tokens_of
from lorasmith.types import Codec, Cond, Denoiser

log = logging.getLogger(__name__)


class PipelineFamily:
    """A family: components -> denoiser, codec, and a pipeline around a changed denoiser."""

    ENCODERS: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    """The parts that pictures and captions cannot be encoded without."""
    IN_FLOAT32: ClassVar[tuple[str, ...]] = ("vae",)
    """Those of them that encode in float32, however they are stored."""
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
        """The encoders on this device, IN_FLOAT32 in float32; those of an open pipeline as it holds them."""
        pipe = self.components.pipeline(self.denoiser.nets)
        missing = [name for name in self.ENCODERS if getattr(pipe, name, None) is None]
        if missing:
            raise ValueError(self.components.lacking(missing))
        if not isinstance(self.components, OpenComponents):
            for name in self.IN_FLOAT32:
                getattr(pipe, name).float()
            for name in MODULES:
                if name not in self.denoiser.nets and getattr(pipe, name, None) is not None:
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


def factor_of(vae: Any) -> int:
    """Pixels along the side of a latent pixel of an AutoencoderKL."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


class PictureCodec:
    """The encoders of a pipeline whose autoencoder is an AutoencoderKL."""

    PATCH: ClassVar[int] = 2
    """Latent pixels along a token's side."""
    kept_tokens: Collection[str] = ()

    def __init__(self, pipe: Any, resolution: int | None = None) -> None:
        """resolution: the side of the pictures that the model was made for, where the pipeline does not state it."""
        self.pipe, self.vae = pipe, pipe.vae
        self.factor = factor_of(self.vae)
        self.multiple = self.factor * self.PATCH
        self.resolution: int = resolution or pipe.default_sample_size * self.factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        width, height = size
        return (self.vae.config["latent_channels"], height // self.factor, width // self.factor)

    @torch.no_grad()
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

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        raise NotImplementedError

    def _t5(self, texts: Sequence[str], name: str, tokenizer: Any, length: int) -> Cond:
        """B texts -> {tokens_of(name): [B,L]} where T5's tokens are kept, else {output_of(name): [B,L,D]}, float32."""
        found = tokens(texts, {name: tokenizer}, {name: length})
        if name in self.kept_tokens:
            return found
        encoder = getattr(self.pipe, name)
        return {output_of(name): encoder(found[tokens_of(name)].to(encoder.device))[0].float()}


@dataclass(frozen=True)
class VideoAutoencoder:
    """Wan's autoencoder, or one made after it: each channel has its mean and deviation, a picture is a frame."""

    vae: Any  # an AutoencoderKLWan or AutoencoderKLQwenImage

    @property
    def factor(self) -> int:
        """Pixels along the side of a latent pixel."""
        return self.vae.spatial_compression_ratio

    def encode(self, videos: Tensor) -> Tensor:
        """videos [B,3,F,H,W] in -1 to 1 -> the posterior's mean, normalised: [B,C,f,h,w], float32."""
        mean = self.vae.encode(videos.to(self.vae.device, self.vae.dtype)).latent_dist.mode().float()
        return (mean - self._by_channel("latents_mean", mean)) / self._by_channel("latents_std", mean)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,C,f,h,w] -> videos [B,3,F,H,W] in -1 to 1, float32."""
        latents = latents * self._by_channel("latents_std", latents) + self._by_channel("latents_mean", latents)
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample.float()

    def _by_channel(self, name: str, like: Tensor) -> Tensor:
        return torch.tensor(self.vae.config[name], device=like.device).view(-1, 1, 1, 1)


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
    warn_of_counts(texts, [len(tokenizer(text).input_ids) for text in texts], length)


def warn_of_counts(texts: Sequence[str], nums_tokens: Sequence[int], length: int) -> None:
    """The same, of texts that are so many tokens long with what is put around them."""
    for text, num_tokens in zip(texts, nums_tokens, strict=True):
        if num_tokens > length:
            log.warning("only the first %d of %d tokens are read of %r", length, num_tokens, text[:60])


def num_chat_tokens(tokenizer: Any, messages: Sequence[Any], options: Mapping[str, bool]) -> int:
    """The tokens of one conversation in a tokenizer's chat template, with these of the template's options."""
    chats = tokenizer.apply_chat_template([messages], tokenize=True, return_dict=True, **options)
    return len(chats["input_ids"][0])


def masked(texts: Sequence[Tensor]) -> Cond:
    """B texts [L_i,D] without padding -> {"text": [B,L,D], "mask": [B,L]}, float32, padded to the longest."""
    masks = [text.new_ones(len(text), dtype=torch.float32) for text in texts]
    return {
        "text": pad_sequence([text.float() for text in texts], batch_first=True),
        "mask": pad_sequence(masks, batch_first=True),
    }


def read_tokens(cond: Cond) -> Tensor:
    """Which tokens are read, bool [B,L]: all of them where conditioning has no "mask".

    ValueError where the mask is of another length than the text.
    """
    text = cond["text"]
    if "mask" not in cond:
        return text.new_ones(text.shape[:2], dtype=torch.bool)
    mask = cond["mask"] > 0
    if mask.shape != text.shape[:2]:
        raise ValueError(
            f"positive must hold a mask as long as text, {list(text.shape[1:2])}, got {list(mask.shape[1:])}"
        )
    return mask


def mask_of(cond: Cond) -> Tensor | None:
    """The tokens that are read, bool [B,L]; None where all are, as attention is faster without a mask."""
    mask = read_tokens(cond)
    return None if mask.all() else mask


def refuse_odd(latents: Tensor) -> None:
    """ValueError where latents [B,C,h,w] cannot be cut into squares of 2 x 2."""
    height, width = latents.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"latents must have even sides for this model, got {[height, width]}")


def packed(latents: Tensor) -> Tensor:
    """latents [B,C,h,w] -> tokens [B,h/2 w/2,4C], each a square of 2 x 2; ValueError where a side is odd."""
    refuse_odd(latents)
    batch, channels, height, width = latents.shape
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
