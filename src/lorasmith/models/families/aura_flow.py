"""AuraFlow (fal 2024), through diffusers. B batch, L tokens, D width, h w latent sides."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.models.families.base import PictureCodec, PipelineFamily, warn_of_cuts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of, refuse_odd
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_TOKENS = 256  # of T5; padding is zeros, which are read too
RESOLUTION = 1024  # the pipeline's default side, in pixels


class AuraFlowDenoiser(TransformerDenoiser):
    """An AuraFlowTransformer2DModel; conditioning is {"text": [B,L,D]}."""

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """ValueError where latents are larger than the learned table of places."""
        refuse_odd(x_t)
        largest = 2 * math.isqrt(self.transformer.config["pos_embed_max_size"])
        if max(x_t.shape[-2:]) > largest:
            raise ValueError(f"latents must have sides of at most {largest} for this model, got {list(x_t.shape[-2:])}")
        return self.transformer(hidden_states=x_t, timestep=t, encoder_hidden_states=cond["text"]).sample


class AuraFlowCodec(PictureCodec):
    """The autoencoder and T5."""

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,256,D]}, float32."""
        warn_of_cuts(texts, self.pipe.tokenizer, NUM_TOKENS)
        text, *_ = self.pipe.encode_prompt(
            list(texts), device=self.pipe.text_encoder.device, do_classifier_free_guidance=False,
            max_sequence_length=NUM_TOKENS,
        )  # fmt: skip
        return {"text": text.float()}


class AuraFlow(PipelineFamily):
    """AuraFlow 0.1 to 0.3."""

    def denoiser_of(self, components: Components) -> AuraFlowDenoiser:
        return AuraFlowDenoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> AuraFlowCodec:
        return AuraFlowCodec(pipe, RESOLUTION)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "auraflow/lora", "ss_base_model_version": "auraflow"}
