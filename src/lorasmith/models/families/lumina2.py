"""Lumina-Image 2.0 (Qin et al. 2025), through diffusers. B batch, C channels, L tokens, D width, h w latent sides."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, no_grad

from lorasmith.models.checkpoints.transformer_configs import Config, Shapes, num_blocks
from lorasmith.models.checkpoints.transformers import Convert, OriginalTransformer, State
from lorasmith.models.families.base import PictureCodec, PipelineFamily, masked, warn_of_counts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of, read_tokens, refuse_odd
from lorasmith.models.families.flux import VAE
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


def _grouped(state: State, convert: Convert) -> State:
    """Lumina 2's layers qkv are queries and, of fewer heads, keys and values, one below the other."""
    width = state["x_embedder.weight"].shape[0]
    for key in [key for key in state if ".attention.qkv." in key]:
        tensor = state.pop(key)
        rows = [width, (len(tensor) - width) // 2, (len(tensor) - width) // 2]
        for name, part in zip(("to_q", "to_k", "to_v"), tensor.split(rows), strict=True):
            state[key.replace("qkv", name)] = part
    return convert(state)


def config_of(shapes: Shapes, base: Config) -> Config:
    """The values of the transformer's config that vary among the published models."""
    width, channels = shapes["x_embedder.weight"]
    head, patch = shapes["layers.0.attn.norm_q.weight"][0], base.get("patch_size", 2)
    out = shapes["norm_out.linear_2.weight"][0] // patch**2
    return {
        "in_channels": channels // patch**2,
        "out_channels": None if out == channels // patch**2 else out,
        "hidden_size": width,
        "num_layers": num_blocks(shapes, "layers."),
        "num_refiner_layers": num_blocks(shapes, "noise_refiner."),
        "num_attention_heads": width // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.1.weight"][1],
    }


class Lumina2(PipelineFamily):
    """Lumina-Image 2.0."""

    ORIGINAL = OriginalTransformer(
        "Lumina2Transformer2DModel", config_of, "attention.qkv.", _grouped, "axes_dim_rope",
        lambda _: {"shift": 6.0}, VAE,
    )  # fmt: skip

    def denoiser_of(self, components: Components) -> Lumina2Denoiser:
        return Lumina2Denoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> Lumina2Codec:
        return Lumina2Codec(pipe)

    def metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": "lumina-2/lora", "ss_base_model_version": "lumina2"}
