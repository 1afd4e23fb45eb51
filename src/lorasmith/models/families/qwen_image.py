"""Qwen-Image (Wu et al. 2025), through diffusers. B batch, L tokens, D width, h w latent sides, H W pixels."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.models.checkpoints.transformer_configs import Config, Shapes, holds, num_blocks
from lorasmith.models.checkpoints.transformers import OriginalTransformer
from lorasmith.models.families.base import PipelineFamily, VideoAutoencoder, warn_of_cuts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of, mask_of, packed, unpacked
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_TOKENS = 512  # of the caption and the template's end
UNREAD = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImageDenoiser(TransformerDenoiser):
    """A QwenImageTransformer2DModel; conditioning is {"text": [B,L,D], "mask": [B,L]}."""

    SQUARE = 2

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[-2:]
        out = self.transformer(
            hidden_states=packed(x_t),
            timestep=t.to(x_t.dtype),
            encoder_hidden_states=cond["text"],
            encoder_hidden_states_mask=mask_of(cond),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
        ).sample
        return unpacked(out, height, width)

    def unread(self) -> Collection[str]:
        """What the last block makes of the text, which nothing comes after."""
        last = len(self.transformer.transformer_blocks) - 1
        return {f"transformer.transformer_blocks.{last}.{name}" for name in UNREAD}


class QwenImageCodec:
    """The autoencoder, of whose videos a picture is a frame, and Qwen2.5-VL, which reads captions in a template."""

    PATCH = 2  # latent pixels along a token's side

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.autoencoder = pipe, VideoAutoencoder(pipe.vae)
        self.multiple = self.autoencoder.factor * self.PATCH
        self.resolution: int = pipe.default_sample_size * self.autoencoder.factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        (width, height), factor = size, self.autoencoder.factor
        return (self.pipe.vae.config["z_dim"], height // factor, width // factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in -1 to 1 -> latents [B,C,h,w], float32."""
        return self.autoencoder.encode(images[:, :, None])[:, :, 0]

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w] -> images [B,3,H,W] in -1 to 1, float32."""
        return self.autoencoder.decode(latents[:, :, None])[:, :, 0]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D], "mask": [B,L]}, float32; L is that of the longest."""
        warn_of_cuts(texts, self.pipe.tokenizer, NUM_TOKENS)
        device = self.pipe.text_encoder.device
        text, mask = self.pipe.encode_prompt(list(texts), device=device, max_sequence_length=NUM_TOKENS)
        mask = torch.ones(text.shape[:2], device=device) if mask is None else mask  # None where texts are equally long
        return {"text": text.float(), "mask": mask.float()}


def config_of(shapes: Shapes, base: Config) -> Config:
    """The values of the transformer's config that vary among the published models."""
    (width, channels), head = shapes["img_in.weight"], shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // base.get("patch_size", 2) ** 2,
        "num_layers": num_blocks(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "use_additional_t_cond": holds(shapes, "addition_t_embedding"),
    }


class QwenImage(PipelineFamily):
    """Qwen-Image."""

    ORIGINAL = OriginalTransformer(
        "QwenImageTransformer2DModel", config_of, "\0", axes="axes_dims_rope",
        published=lambda _: {
            "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
            "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
        },
    )  # fmt: skip

    def denoiser_of(self, components: Components) -> QwenImageDenoiser:
        return QwenImageDenoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> QwenImageCodec:
        return QwenImageCodec(pipe)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "Qwen-Image/lora", "ss_base_model_version": "qwen_image"}
