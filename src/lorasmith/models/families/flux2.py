"""Flux.2 dev and klein (Black Forest Labs 2025), through diffusers.

B batch, C channels, L tokens, D width, h w latent sides: a sixteenth of the picture's, a token a pixel.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorasmith.diffusion.process import Flow
from lorasmith.models.checkpoints.transformer_configs import Config, Shapes, holds
from lorasmith.models.checkpoints.transformers import OriginalTransformer
from lorasmith.models.families.base import PipelineFamily, factor_of, num_chat_tokens, warn_of_counts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of
from lorasmith.models.families.flux import AXES, GUIDANCE, NUM_TOKENS, flux_like, grid
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_STEPS = 50  # the pipelines' default
QWEN = {"add_generation_prompt": True, "enable_thinking": False}  # how klein's captions are put into a conversation


class Flux2Denoiser(TransformerDenoiser):
    """A Flux2Transformer2DModel; conditioning is {"text": [B,L,D]}."""

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[-2:]
        guidance = cond["guidance"][:, 0] if "guidance" in cond else t.new_full(t.shape, GUIDANCE)
        out = self.transformer(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t,
            guidance=guidance if self.transformer.config["guidance_embeds"] else None,
            encoder_hidden_states=cond["text"],
            txt_ids=F.pad(torch.arange(cond["text"].shape[1])[:, None], (3, 0)).to(x_t.device),
            img_ids=F.pad(grid(height, width), (0, 1)).to(x_t.device),
        ).sample
        return out.transpose(1, 2).unflatten(2, (height, width))


class DistilledFlux2(Flux2Denoiser):
    """One that needs no second prediction for guidance: dev is told it, the distilled klein knows but one."""

    def guided(self, cond: Cond, guidance: float) -> Cond:
        return cond | {"guidance": cond["text"].new_full((len(cond["text"]), 1), guidance)}


def empirical_shift(shape: Sequence[int]) -> float:
    """The shift of times for latents [C,h,w], by the pipelines' law of the numbers of tokens and steps, at 50 steps."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # takes seconds and is seldom needed

    height, width = shape[-2:]
    return math.exp(compute_empirical_mu(height * width, NUM_STEPS))


def _flow(scheduler: Mapping[str, Any]) -> Flow:
    """The flow of a scheduler's config; where its shift depends on the size, by `empirical_shift`."""
    flow = flow_of(scheduler)
    return Flow(by_size=empirical_shift) if flow.by_size else flow


class Flux2Codec:
    """The autoencoder, whose latents are cut into squares of 2 x 2 and normalised, and the text encoder."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.vae = pipe, pipe.vae
        factor = factor_of(self.vae)
        self.multiple = 2 * factor
        self.resolution: int = pipe.default_sample_size * factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        width, height = size
        return (4 * self.vae.config["latent_channels"], height // self.multiple, width // self.multiple)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in -1 to 1 -> the posterior's mean, cut into squares, normalised: [B,C,h,w], float32."""
        latents = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        mean, std = self._statistics
        return (F.pixel_unshuffle(latents.float(), 2) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w] -> images [B,3,H,W] in about -1 to 1, float32."""
        mean, std = self._statistics
        latents = F.pixel_shuffle(latents.to(self.vae.device) * std + mean, 2)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    @property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, [C,1,1], float32."""
        norm = self.vae.bn
        std = (norm.running_var.float() + self.vae.config["batch_norm_eps"]).sqrt()
        return norm.running_mean.float().view(-1, 1, 1), std.view(-1, 1, 1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,512,D]}, float32: hidden states of three layers side by side, of padding too."""
        warn_of_counts(texts, [self.num_tokens(text) for text in texts], NUM_TOKENS)
        device = self.pipe.text_encoder.device
        text, _ = self.pipe.encode_prompt(list(texts), device=device, max_sequence_length=NUM_TOKENS)
        return {"text": text.float()}

    def num_tokens(self, text: str) -> int:
        """Of a text in its conversation."""
        raise NotImplementedError


class MistralCodec(Flux2Codec):
    """With the text encoder of dev, whose conversations begin with a system message."""

    def num_tokens(self, text: str) -> int:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        (messages,) = format_input([text], self.pipe.system_message)
        return num_chat_tokens(self.pipe.tokenizer, messages, {})


class QwenCodec(Flux2Codec):
    """With the text encoder of klein."""

    def num_tokens(self, text: str) -> int:
        return num_chat_tokens(self.pipe.tokenizer, [{"role": "user", "content": text}], QWEN)


def config_of(shapes: Shapes, base: Config) -> Config:
    """The values of the transformer's config that vary among the published models."""
    width, hidden = shapes["x_embedder.weight"][0], shapes["transformer_blocks.0.ff.linear_in.weight"][0]
    return {
        **flux_like(shapes),
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": hidden / 2 / width,  # half of it is the gate
        "guidance_embeds": holds(shapes, "guidance_embedder"),
    }


ORIGINAL = OriginalTransformer("Flux2Transformer2DModel", config_of, "double_blocks.", axes=AXES)


class Flux2(PipelineFamily):
    """Flux.2 dev."""

    ORIGINAL = ORIGINAL

    def denoiser_of(self, components: Components) -> DistilledFlux2:
        return DistilledFlux2(components.net("transformer"), _flow(components.scheduler))

    def codec_of(self, pipe: Any) -> MistralCodec:
        return MistralCodec(pipe)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "Flux.2-dev/lora", "ss_base_model_version": "flux2"}


class Flux2Klein(PipelineFamily):
    """Flux.2 klein: the distilled one, and its base, which is drawn with classifier-free guidance."""

    ORIGINAL = ORIGINAL

    def denoiser_of(self, components: Components) -> Flux2Denoiser:
        kind = DistilledFlux2 if components.config("is_distilled") else Flux2Denoiser
        return kind(components.net("transformer"), _flow(components.scheduler))

    def codec_of(self, pipe: Any) -> QwenCodec:
        return QwenCodec(pipe)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "Flux.2-klein/lora", "ss_base_model_version": "flux2"}
