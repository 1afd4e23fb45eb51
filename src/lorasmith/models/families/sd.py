"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022), through diffusers. B batch, L tokens, D width, H W pixels."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from lorasmith.diffusion.process import Diffusion
from lorasmith.models.checkpoints.sd import OriginalSD
from lorasmith.models.families.base import PictureCodec, PipelineFamily, factor_of, warn_of_cuts
from lorasmith.models.families.denoisers import UNetDenoiser, check_inputs, dtype_of
from lorasmith.models.sources.components import Components
from lorasmith.models.text_encoders import Texts, tokens
from lorasmith.types import Cond

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


class StableDiffusionDenoiser(UNetDenoiser):
    """Conditioning is {"text": [B,L,D]}."""

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,4,h,w], t [B], cond {"text": [B,L,D]} -> the UNet's output [B,4,h,w], float32."""
        config, dtype = self.unet.config, dtype_of(self.unet)
        check_inputs(x_t, cond, channels=config["in_channels"], widths={"text": config["cross_attention_dim"]})
        return self.unet(x_t.to(dtype), t, cond["text"].to(dtype)).sample.float()


def text_of(encoders: Mapping[str, Any], cond: Cond) -> Cond:
    """{"text_encoder": CLIPTextModel}, {"ids": [B,L]} -> {"text": [B,L,D]}."""
    return {"text": encoders["text_encoder"](cond["ids"]).last_hidden_state}


class StableDiffusionCodec(PictureCodec):
    """The autoencoder, the CLIP text encoder and its tokenizer."""

    def __init__(self, pipe: Any) -> None:
        unet, text_encoder, tokenizer = pipe.unet.config, pipe.text_encoder.config, pipe.tokenizer
        if not isinstance(unet["sample_size"], int):
            raise ValueError(f"the UNet's sample_size must be a whole number, got {unet['sample_size']!r}")
        if len(tokenizer) != text_encoder.vocab_size:
            raise ValueError(
                f"tokenizer and text encoder must know the same words, "
                f"got {len(tokenizer)} and {text_encoder.vocab_size}"
            )
        super().__init__(pipe, unet["sample_size"] * factor_of(pipe.vae))
        self.num_tokens: int = text_encoder.max_position_embeddings
        self.multiple = self.factor * 2 ** (len(unet["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D]}, float32, or their tokens."""
        encoders, tokenizers = {"text_encoder": self.pipe.text_encoder}, {"text_encoder": self.pipe.tokenizer}
        warn_of_cuts(texts, self.pipe.tokenizer, self.num_tokens)
        found = tokens(texts, tokenizers, {"text_encoder": self.num_tokens})
        if self.kept_tokens:
            return found
        ids = {name: value.to(self.pipe.text_encoder.device) for name, value in found.items()}
        return {name: value.float() for name, value in text_of(encoders, ids).items()}


class StableDiffusion(PipelineFamily[StableDiffusionDenoiser, StableDiffusionCodec]):
    """Stable Diffusion 1.x and 2.x."""

    ORIGINAL = OriginalSD()
    ENCODERS = ("vae", "text_encoder", "tokenizer")
    IN_FLOAT32 = ("vae", "text_encoder")
    TEXTS: ClassVar[Texts | None] = Texts({"text_encoder": "lora_te"}, text_of)

    def denoiser_of(self, components: Components) -> StableDiffusionDenoiser:
        return StableDiffusionDenoiser(components.net("unet"), diffusion(components.scheduler))

    def codec_of(self, pipe: Any) -> StableDiffusionCodec:
        return StableDiffusionCodec(pipe)

    def metadata(self) -> dict[str, str]:
        version = "2" if self.denoiser.unet.config["cross_attention_dim"] == 1024 else "1"
        return {
            "modelspec.architecture": f"stable-diffusion-v{version}/lora",
            "modelspec.prediction_type": PREDICTION_NAMES[self.denoiser.process.prediction],
            "ss_base_model_version": f"sd_v{version}",
            "ss_v2": str(version == "2"),
        }
