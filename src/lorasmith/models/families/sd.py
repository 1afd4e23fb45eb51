"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), through diffusers. B batch, L tokens, D width, H W pixels."""

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lorasmith.diffusion.process import Diffusion
from lorasmith.models.text_encoders import Texts, tokens
from lorasmith.types import Cond, Denoiser

log = logging.getLogger(__name__)

PREDICTIONS: dict[str, Literal["eps", "v", "x0"]] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
PREDICTION_NAMES = {"eps": "epsilon", "v": "v", "x0": "sample"}  # modelspec's
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def diffusion(scheduler: Mapping[str, Any]) -> Diffusion:
    """The process of a scheduler's config, zero terminal SNR included; ValueError on unknown predictions."""
    name = scheduler.get("prediction_type", "epsilon")  # older configs do not say it
    prediction = PREDICTIONS.get(name)
    if prediction is None:
        raise ValueError(f"scheduler.prediction_type must be one of {', '.join(PREDICTIONS)}, got {name!r}")
    given = {key: scheduler[key] for key in BETAS if key in scheduler}
    try:
        return Diffusion(DDPMScheduler(**given).alphas_cumprod, prediction)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the scheduler's config must describe betas, got {given}: {error}") from error


@dataclass(frozen=True)
class StableDiffusionDenoiser:
    """The UNet and its process."""

    unet: UNet2DConditionModel
    process: Diffusion

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,4,h,w], t [B], cond {"text": [B,L,D]} -> the UNet's output [B,4,h,w], float32.

        ValueError where the latents or the conditioning are another model's.
        """
        self._check(x_t, cond)
        dtype = next(self.unet.parameters()).dtype  # its own property walks all modules
        return self.unet(x_t.to(dtype), t, cond["text"].to(dtype)).sample.float()

    def _check(self, x_t: Tensor, cond: Cond) -> None:
        channels, width = self.unet.config["in_channels"], self.unet.config["cross_attention_dim"]
        if x_t.ndim != 4 or x_t.shape[1] != channels:
            raise ValueError(f"latents must be [N,{channels},h,w] for this model, got {[len(x_t), *x_t.shape[1:]]}")
        if "text" not in cond or cond["text"].shape[-1] != width:
            found = f"width {cond['text'].shape[-1]}" if "text" in cond else f"only {', '.join(cond) or 'nothing'}"
            raise ValueError(f"positive must hold text [L,{width}] for this model, got {found}")

    def file_key(self, path: str) -> str:
        """unet.down_blocks.0… -> lora_unet_down_blocks_0…: kohya's names."""
        return f"lora_{path}".replace(".", "_")


def text_of(encoders: Mapping[str, Any], cond: Cond) -> Cond:
    """{"text_encoder": CLIPTextModel}, {"ids": [B,L]} -> {"text": [B,L,D]}."""
    return {"text": encoders["text_encoder"](cond["ids"]).last_hidden_state}


class StableDiffusionCodec:
    """The autoencoder, the CLIP text encoder and its tokenizer."""

    kept_tokens: Collection[str] = ()

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: CLIPTokenizer, unet: Mapping[str, Any]) -> None:
        """vae: an AutoencoderKL; text_encoder: a CLIPTextModel; unet: the UNet's config."""
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        if not isinstance(unet["sample_size"], int):
            raise ValueError(f"the UNet's sample_size must be a whole number, got {unet['sample_size']!r}")
        if len(tokenizer) != text_encoder.config.vocab_size:
            raise ValueError(
                f"tokenizer and text encoder must know the same words, "
                f"got {len(tokenizer)} and {text_encoder.config.vocab_size}"
            )
        self.num_tokens: int = text_encoder.config.max_position_embeddings
        self.factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.resolution = unet["sample_size"] * self.factor
        self.multiple = 2 ** (len(unet["block_out_channels"]) - 1) * self.factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        width, height = size
        return (self.vae.config["latent_channels"], height // self.factor, width // self.factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in -1 to 1 -> the posterior's mean, scaled: [B,4,h,w], float32."""
        mean = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return mean.float() * self.vae.config["scaling_factor"]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D]}, float32, or their tokens; what is too long is cut, which is logged."""
        length = self.num_tokens
        for text in texts:
            num_tokens = len(self.tokenizer(text).input_ids)
            if num_tokens > length:
                log.warning("only the first %d of %d tokens are read of %r", length, num_tokens, text[:60])
        found = tokens(texts, {"text_encoder": self.tokenizer}, {"text_encoder": length})
        if self.kept_tokens:
            return found
        ids = {name: value.to(self.text_encoder.device) for name, value in found.items()}
        return {name: value.float() for name, value in text_of({"text_encoder": self.text_encoder}, ids).items()}

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,4,h,w] -> images [B,3,H,W] in about -1 to 1, float32."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config["scaling_factor"]
        return self.vae.decode(latents).sample.float()


class Encoders(NamedTuple):
    """What turns pictures and captions into latents and conditioning."""

    vae: Any  # an AutoencoderKL
    text_encoder: Any  # a CLIPTextModel
    tokenizer: CLIPTokenizer


class Source(Protocol):
    """Where a Stable Diffusion model comes from; the encoders are loaded when they are asked for."""

    @property
    def unet(self) -> UNet2DConditionModel: ...

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's config."""
        ...

    def encoders(self, device: torch.device) -> Encoders:
        """On this device in float32, or as a pipeline holds them; ValueError where there are none."""
        ...

    def pipeline(self, unet: UNet2DConditionModel) -> Any:
        """A diffusers pipeline around this UNet."""
        ...


@dataclass(frozen=True)
class OpenPipeline:
    """A diffusers pipeline that a caller hands over: its parts are used as they are."""

    pipe: Any

    @property
    def unet(self) -> UNet2DConditionModel:
        if self.pipe.unet is None:
            raise ValueError("model must hold a UNet, but the pipeline's is None")
        return self.pipe.unet

    @property
    def scheduler(self) -> Mapping[str, Any]:
        return self.pipe.scheduler.config

    def encoders(self, device: torch.device) -> Encoders:
        parts = {name: getattr(self.pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            raise ValueError(f"model must hold {' and '.join(missing)} to encode captions, but the pipeline's is None")
        return Encoders(**parts)

    def pipeline(self, unet: UNet2DConditionModel) -> Any:
        twin = copy.copy(self.pipe)
        twin.unet = unet
        return twin


class StableDiffusion:
    """The family: a source -> denoiser, codec, and a pipeline around a changed denoiser."""

    TEXTS: ClassVar[Texts | None] = Texts({"text_encoder": "lora_te"}, text_of)

    def __init__(self, source: Source) -> None:
        self.denoiser = StableDiffusionDenoiser(source.unet, diffusion(source.scheduler))
        self.source = source

    def codec(self, device: torch.device) -> StableDiffusionCodec:
        """The encoders on this device in float32, or as a pipeline holds them."""
        return StableDiffusionCodec(*self.source.encoders(device), self.denoiser.unet.config)

    def pipeline(self, denoiser: Denoiser) -> Any:
        """A diffusers pipeline that predicts with this copy of the denoiser; the source's own stays as it is."""
        unet: Any = denoiser.nets["unet"]
        pipe = self.source.pipeline(unet)
        for name in denoiser.nets.keys() - {"unet"}:
            setattr(pipe, name, denoiser.nets[name])
        return pipe

    def metadata(self) -> dict[str, str]:
        """What other tools read of a base model: modelspec and kohya's keys."""
        version = "2" if self.denoiser.unet.config["cross_attention_dim"] == 1024 else "1"
        return {
            "modelspec.architecture": f"stable-diffusion-v{version}/lora",
            "modelspec.prediction_type": PREDICTION_NAMES[self.denoiser.process.prediction],
            "ss_base_model_version": f"sd_v{version}",
            "ss_v2": str(version == "2"),
        }
