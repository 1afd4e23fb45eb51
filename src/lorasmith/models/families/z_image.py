"""Z-Image (Tongyi Lab 2025), through diffusers. B batch, C channels, L tokens, D width, h w latent sides."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.models.checkpoints.transformer_configs import Config, Shapes, num_blocks
from lorasmith.models.checkpoints.transformers import OriginalTransformer
from lorasmith.models.families.base import PictureCodec, PipelineFamily, masked, num_chat_tokens, warn_of_counts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of, read_tokens, refuse_odd
from lorasmith.models.families.flux import VAE
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_TOKENS = 512  # that are read of a caption in its conversation
RESOLUTION = 1024  # the pipeline's default side, in pixels
QWEN = {"add_generation_prompt": True, "enable_thinking": True}  # how captions are put into a conversation


class ZImageDenoiser(TransformerDenoiser):
    """A ZImageTransformer2DModel; conditioning is {"text": [B,L,D], "mask": [B,L]}.

    The pipeline's guidance_scale counts from 0: it is one less than guidance here.
    """

    WIDTHS = {"text": "cap_feat_dim"}

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The net's own time is 1 - t and it predicts x0 - eps; it takes texts without padding."""
        refuse_odd(x_t)
        texts = [text[read] for text, read in zip(cond["text"], read_tokens(cond), strict=True)]
        frames = list(x_t.unsqueeze(2))  # each [C,1,h,w]
        return -torch.stack(self.transformer(frames, 1 - t, texts).sample).squeeze(2)


class ZImageCodec(PictureCodec):
    """The autoencoder, and Qwen 3 for captions, which are kept without padding."""

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D], "mask": [B,L]}, float32."""
        chats = [[{"role": "user", "content": text}] for text in texts]
        warn_of_counts(texts, [num_chat_tokens(self.pipe.tokenizer, chat, QWEN) for chat in chats], NUM_TOKENS)
        encoded, _ = self.pipe.encode_prompt(
            list(texts), device=self.pipe.text_encoder.device, do_classifier_free_guidance=False,
            max_sequence_length=NUM_TOKENS,
        )  # fmt: skip
        return masked(encoded)


def config_of(shapes: Shapes, base: Config) -> Config:
    """The values of the transformer's config that vary among the published models."""
    width, channels = shapes["all_x_embedder.2-1.weight"]
    head = shapes["layers.0.attention.norm_q.weight"][0]
    return {
        "in_channels": channels // 4,
        "dim": width,
        "n_layers": num_blocks(shapes, "layers."),
        "n_refiner_layers": num_blocks(shapes, "noise_refiner."),
        "n_heads": width // head,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
    }


class ZImage(PipelineFamily):
    """Z-Image and Z-Image Turbo."""

    ORIGINAL = OriginalTransformer("ZImageTransformer2DModel", config_of, "attention.qkv.", axes="axes_dims", vae=VAE)

    def denoiser_of(self, components: Components) -> ZImageDenoiser:
        return ZImageDenoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> ZImageCodec:
        return ZImageCodec(pipe, RESOLUTION)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "Z-Image/lora", "ss_base_model_version": "zimage"}
