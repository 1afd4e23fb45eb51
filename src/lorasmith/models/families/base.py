"""What families share: their parts from diffusers' pipelines, autoencoders and texts.

B batch, C channels, f h w latent frames and sides, F H W frames and pixels, L tokens.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorasmith.models.checkpoints.original import Original
from lorasmith.models.sources.components import Components, OpenComponents
from lorasmith.models.sources.folder_layout import MODULES
from lorasmith.models.text_encoders import Texts, output_of, tokens, tokens_of
from lorasmith.types import Codec, Cond, Denoiser

log = logging.getLogger(__name__)


D = TypeVar("D", bound=Denoiser)
C = TypeVar("C", bound=Codec)


class PipelineFamily(Generic[D, C]):
    """A family: components -> denoiser, codec, and a pipeline around a changed denoiser."""

    ORIGINAL: ClassVar[Original]
    """How single files hold its denoiser, where its architecture has model_signs."""
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

    def denoiser_of(self, components: Components) -> D:
        raise NotImplementedError

    def codec_of(self, pipe: Any) -> C:
        raise NotImplementedError

    def codec(self, device: torch.device) -> C:
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
