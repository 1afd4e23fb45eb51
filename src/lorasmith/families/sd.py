"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), through diffusers. B batch, L tokens, D width, H W pixels."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lorasmith.noise import Diffusion
from lorasmith.types import Cond, Denoiser

log = logging.getLogger(__name__)

PREDICTIONS: dict[str, Literal["eps", "v", "x0"]] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
UNREADABLE = (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)
Part = TypeVar("Part", UNet2DConditionModel, AutoencoderKL, CLIPTextModel)


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
        """x_t [B,4,h,w], t [B], cond {"text": [B,L,D]} -> the UNet's output [B,4,h,w], float32."""
        dtype = self.unet.dtype
        return self.unet(x_t.to(dtype), t, cond["text"].to(dtype)).sample.float()

    def file_key(self, path: str) -> str:
        """unet.down_blocks.0… -> lora_unet_down_blocks_0…: kohya's names."""
        return f"lora_{path}".replace(".", "_")


class StableDiffusionCodec:
    """The autoencoder, the CLIP text encoder and its tokenizer."""

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

    def encode_images(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in -1 to 1 -> the posterior's mean, scaled: [B,4,h,w], float32."""
        mean = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return mean.float() * self.vae.config["scaling_factor"]

    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D]}, float32; texts beyond the encoder's length are cut, which is logged."""
        length = self.num_tokens
        for text in texts:
            num_tokens = len(self.tokenizer(text).input_ids)
            if num_tokens > length:
                log.warning("only the first %d of %d tokens are read of %r", length, num_tokens, text[:60])
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        hidden = self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state
        return {"text": hidden.float()}

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,4,h,w] -> images [B,3,H,W] in about -1 to 1, float32."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config["scaling_factor"]
        return self.vae.decode(latents).sample.float()


def _part(kind: type[Part], folder: Path, name: str, dtype: torch.dtype | None) -> Part:
    """One part of a diffusers folder, in this dtype (None: as stored); ValueError where it is missing or broken."""
    weights = folder / name
    if not weights.is_dir():
        raise ValueError(f"{folder} must hold {name}/ to be a Stable Diffusion model, but it does not")
    if not list(weights.glob("*.safetensors")):
        raise ValueError(f"{weights} must hold safetensors weights: pickles can run code when they are loaded")
    try:
        with safe_open(sorted(weights.glob("*.safetensors"))[0], framework="pt") as file:
            stored = file.get_tensor(next(iter(file.keys()))).dtype
        part = kind.from_pretrained(weights, dtype=dtype or stored, use_safetensors=True, local_files_only=True)
    except UNREADABLE as error:
        raise ValueError(f"cannot load {weights}: {str(error).splitlines()[0]}") from error
    missing = [key for key, parameter in part.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"cannot load {weights}: {len(missing)} tensors are missing, such as {missing[0]}")
    return part


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """ValueError where a file is missing, without which the library would make an empty vocabulary."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ValueError(f"{folder} must hold tokenizer.json or vocab.json, but it does not")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"cannot load {folder}: {str(error).splitlines()[0]}") from error


class StableDiffusion:
    """The family: a diffusers folder or pipeline -> denoiser, codec, and a pipeline around a changed denoiser."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: Mapping[str, Any], source: Any) -> None:
        self.denoiser = StableDiffusionDenoiser(unet, diffusion(scheduler))
        self.source = source

    @classmethod
    def from_folder(cls, folder: Path) -> "StableDiffusion":
        try:
            scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read scheduler/scheduler_config.json of {folder}: {error}") from error
        if not isinstance(scheduler, dict):
            raise ValueError(f"scheduler/scheduler_config.json of {folder} must be a table, got {scheduler!r:.50}")
        return cls(_part(UNet2DConditionModel, folder, "unet", None), scheduler, folder)

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> "StableDiffusion":
        return cls(pipeline.unet, pipeline.scheduler.config, pipeline)

    def codec(self, device: torch.device) -> StableDiffusionCodec:
        """The encoders on this device in float32, or as a pipeline holds them."""
        config = self.denoiser.unet.config
        if not isinstance(self.source, Path):
            return StableDiffusionCodec(self.source.vae, self.source.text_encoder, self.source.tokenizer, config)
        vae: Any = _part(AutoencoderKL, self.source, "vae", torch.float32)
        text_encoder: Any = _part(CLIPTextModel, self.source, "text_encoder", torch.float32)
        tokenizer = _tokenizer(self.source / "tokenizer")
        return StableDiffusionCodec(vae.to(device), text_encoder.to(device), tokenizer, config)

    def pipeline(self, denoiser: Denoiser) -> Any:
        """A diffusers pipeline that predicts with this copy of the denoiser; the source's own stays as it is."""
        assert isinstance(denoiser, StableDiffusionDenoiser)
        from diffusers import StableDiffusionPipeline  # takes seconds and is seldom needed

        if isinstance(self.source, Path):
            return StableDiffusionPipeline.from_pretrained(
                self.source, unet=denoiser.unet, dtype=denoiser.unet.dtype, local_files_only=True
            )
        twin = copy.copy(self.source)
        twin.unet = denoiser.unet
        return twin

    def metadata(self) -> dict[str, str]:
        """What other tools read of a base model: modelspec and kohya's keys."""
        version = "2" if self.denoiser.unet.config["cross_attention_dim"] == 1024 else "1"
        prediction = {"eps": "epsilon", "v": "v", "x0": "sample"}[self.denoiser.process.prediction]
        return {
            "modelspec.architecture": f"stable-diffusion-v{version}/lora",
            "modelspec.prediction_type": prediction,
            "ss_base_model_version": f"sd_v{version}",
            "ss_v2": str(version == "2"),
        }
