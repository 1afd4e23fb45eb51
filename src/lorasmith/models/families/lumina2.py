"""Lumina-Image 2.0 (Qin et al. 2025), through diffusers. B batch, C channels, L tokens, D width, h w latent sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, no_grad

from lorasmith.diffusion.process import Flow
from lorasmith.models.families.base import (
    PictureCodec,
    PipelineFamily,
    check_inputs,
    dtype_of,
    flow_of,
    masked,
    read_tokens,
    refuse_odd,
    warn_of_counts,
)
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_TOKENS = 256  # that are read of a caption after the system prompt
PROMPT_START = " <Prompt Start> "  # between the two


@dataclass(frozen=True)
class Lumina2Denoiser:
    """The transformer and its flow. Guidance is plain: the pipeline's is with cfg_normalization=False."""

    transformer: Any  # a Lumina2Transformer2DModel
    process: Flow

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,h,w], t [B], cond {"text": [B,L,D], "mask": [B,L]} -> eps - x0 [B,C,h,w], float32.

        The net's own time is 1 - t and it predicts x0 - eps.
        """
        config, dtype = self.transformer.config, dtype_of(self.transformer)
        check_inputs(x_t, cond, channels=config["in_channels"], widths={"text": config["cap_feat_dim"]})
        refuse_odd(x_t)
        out = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=1 - t,
            encoder_hidden_states=cond["text"].to(dtype),
            encoder_attention_mask=read_tokens(cond),
        ).sample
        return -out.float()

    def file_key(self, path: str) -> str:
        return path


class Lumina2Codec(PictureCodec):
    """The autoencoder, and Gemma 2 for captions, which are kept without padding."""

    @no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D], "mask": [B,L]}, float32.

        A caption follows the system prompt; an empty one stands alone, as the pipeline's empty negative prompt does.
        """
        tokenizer, before = self.pipe.tokenizer, self.pipe.system_prompt + PROMPT_START
        warn_of_counts(texts, [len(tokenizer(before + text).input_ids) for text in texts], NUM_TOKENS)
        return masked([self._encoded(text) for text in texts])

    def _encoded(self, text: str) -> Tensor:
        """[L,D], without padding."""
        tokens, mask, alone, alone_mask = self.pipe.encode_prompt(
            text, not text, negative_prompt="", device=self.pipe.text_encoder.device, max_sequence_length=NUM_TOKENS
        )
        return tokens[0, mask[0].bool()] if text else alone[0, alone_mask[0].bool()]


class Lumina2(PipelineFamily):
    """Lumina-Image 2.0."""

    def denoiser_of(self, components: Components) -> Lumina2Denoiser:
        return Lumina2Denoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> Lumina2Codec:
        return Lumina2Codec(pipe)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "lumina-2/lora", "ss_base_model_version": "lumina2"}
