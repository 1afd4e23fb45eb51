"""Z-Image (Tongyi Lab 2025), through diffusers. B batch, C channels, L tokens, D width, h w latent sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.diffusion.process import Flow
from lorasmith.models.families.base import (
    PictureCodec,
    PipelineFamily,
    check_inputs,
    dtype_of,
    flow_of,
    masked,
    num_chat_tokens,
    read_tokens,
    refuse_odd,
    warn_of_counts,
)
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_TOKENS = 512  # that are read of a caption in its conversation
RESOLUTION = 1024  # the pipeline's default side, in pixels
QWEN = {"add_generation_prompt": True, "enable_thinking": True}  # how captions are put into a conversation


@dataclass(frozen=True)
class ZImageDenoiser:
    """The transformer and its flow. The pipeline's guidance_scale counts from 0: it is one less than guidance here."""

    transformer: Any  # a ZImageTransformer2DModel
    process: Flow

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,h,w], t [B], cond {"text": [B,L,D], "mask": [B,L]} -> eps - x0 [B,C,h,w], float32.

        The net's own time is 1 - t and it predicts x0 - eps; it takes texts without padding.
        """
        config, dtype = self.transformer.config, dtype_of(self.transformer)
        check_inputs(x_t, cond, channels=config["in_channels"], widths={"text": config["cap_feat_dim"]})
        refuse_odd(x_t)
        texts = [text[read] for text, read in zip(cond["text"].to(dtype), read_tokens(cond), strict=True)]
        frames = list(x_t.to(dtype).unsqueeze(2))  # each [C,1,h,w]
        return -torch.stack(self.transformer(frames, 1 - t, texts).sample).squeeze(2).float()

    def file_key(self, path: str) -> str:
        return path


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


class ZImage(PipelineFamily):
    """Z-Image and Z-Image Turbo."""

    def denoiser_of(self, components: Components) -> ZImageDenoiser:
        return ZImageDenoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> ZImageCodec:
        return ZImageCodec(pipe, RESOLUTION)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "Z-Image/lora", "ss_base_model_version": "zimage"}
