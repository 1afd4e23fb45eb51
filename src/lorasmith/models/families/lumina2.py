"""Lumina-Image 2.0 (Qin et al. 2025), through diffusers. B batch, C channels, L tokens, D width, h w latent sides."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, no_grad

from lorasmith.models.families.base import PictureCodec, PipelineFamily, masked, warn_of_counts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of, read_tokens, refuse_odd
from lorasmith.models.sources.components import Components
from lorasmith.types import Cond

NUM_TOKENS = 256  # that are read of a caption after the system prompt
PROMPT_START = " <Prompt Start> "  # between the two


class Lumina2Denoiser(TransformerDenoiser):
    """A Lumina2Transformer2DModel; conditioning is {"text": [B,L,D], "mask": [B,L]}.

    Guidance is plain: the pipeline's is with cfg_normalization=False.
    """

    WIDTHS = {"text": "cap_feat_dim"}

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The net's own time is 1 - t and it predicts x0 - eps."""
        refuse_odd(x_t)
        return -self.transformer(
            hidden_states=x_t,
            timestep=1 - t,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=read_tokens(cond),
        ).sample


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
