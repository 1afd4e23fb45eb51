"""Chroma (Lodestone Rock 2025), through diffusers. B batch, L tokens, D width, h w latent sides."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.models.checkpoints.transformer_configs import Config, Shapes, num_blocks
from lorasmith.models.checkpoints.transformers import OriginalTransformer
from lorasmith.models.families.base import PictureCodec, PipelineFamily, warn_of_cuts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of, mask_of, packed, unpacked
from lorasmith.models.families.flux import AXES, VAE, any_width, flux_like, grid
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_TOKENS = 512  # of T5, at most


class ChromaDenoiser(TransformerDenoiser):
    """A ChromaTransformer2DModel; conditioning is {"text": [B,L,D], "mask": [B,L]}."""

    SQUARE = 2

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[-2:]
        tokens, mask = packed(x_t), mask_of(cond)
        out = self.transformer(
            hidden_states=tokens,
            timestep=t.to(x_t.dtype),
            encoder_hidden_states=cond["text"],
            txt_ids=x_t.new_zeros(cond["text"].shape[1], 3),
            img_ids=grid(height // 2, width // 2).to(x_t),
            # true or false: numbers would be added to the attention's scores, which hides nothing
            attention_mask=None if mask is None else torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
        ).sample
        return unpacked(out, height, width)


class ChromaCodec(PictureCodec):
    """The autoencoder and T5, of whose padding the net reads one token."""

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D], "mask": [B,L]}, float32; L is what the net reads of the longest."""
        warn_of_cuts(texts, self.pipe.tokenizer, NUM_TOKENS)
        text, _, mask, *_ = self.pipe.encode_prompt(
            list(texts), device=self.pipe.text_encoder.device, do_classifier_free_guidance=False,
            max_sequence_length=NUM_TOKENS,
        )  # fmt: skip
        text, mask = text.float(), mask.float()
        length = int(mask.sum(dim=1).max())
        return {"text": (text * mask[..., None])[:, :length], "mask": mask[:, :length]}


def config_of(shapes: Shapes, base: Config) -> Config:
    """The values of the transformer's config that vary among the published models."""
    hidden, channels = shapes["distilled_guidance_layer.in_proj.weight"]
    return {
        **flux_like(shapes),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": num_blocks(shapes, "distilled_guidance_layer.layers."),
    }


class Chroma(PipelineFamily):
    """Chroma1."""

    ORIGINAL = OriginalTransformer("ChromaTransformer2DModel", config_of, "double_blocks.", any_width, AXES, vae=VAE)

    def denoiser_of(self, components: Components) -> ChromaDenoiser:
        return ChromaDenoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> ChromaCodec:
        return ChromaCodec(pipe)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "chroma/lora", "ss_base_model_version": "chroma"}
