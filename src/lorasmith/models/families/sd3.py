"""Stable Diffusion 3 and 3.5 (Esser et al. 2024), through diffusers. B batch, L tokens, D width, h w latent sides."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorasmith.models.checkpoints.transformer_configs import Config, Shapes, num_blocks
from lorasmith.models.checkpoints.transformers import CLIP_G, CLIP_L, T5_XXL, OriginalTransformer
from lorasmith.models.families.base import PictureCodec, PipelineFamily, warn_of_cuts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of, refuse_odd
from lorasmith.models.sources.components import Components
from lorasmith.models.text_encoders import Texts, output_of, tokens, tokens_of
from lorasmith.types import Cond

NUM_TOKENS = 256  # of T5, which come after those of CLIP
NUM_TIMES = 1000.0  # what the net takes the end of time for


class SD3Denoiser(TransformerDenoiser):
    """An SD3Transformer2DModel; conditioning is {"text": [B,L,D], "pooled": [B,P]}."""

    WIDTHS = {"text": "joint_attention_dim", "pooled": "pooled_projection_dim"}

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        refuse_odd(x_t)
        return self.transformer(
            hidden_states=x_t,
            timestep=t * NUM_TIMES,
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
        ).sample

    def unread(self) -> Collection[str]:
        """The queries of the text in the last block, which passes no text on."""
        blocks = enumerate(self.transformer.transformer_blocks)
        return {f"transformer.transformer_blocks.{n}.attn.add_q_proj" for n, block in blocks if block.context_pre_only}


CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"


def text_of(encoders: Mapping[str, Any], cond: Cond) -> Cond:
    """CLIPs and T5, {"ids", "ids_2", "ids_3": [B,L]} -> {"text": [B,77+256,D], "pooled": [B,P]}.

    CLIPs' tokens are read before the last layer. Without T5 its output [B,256,D] is in the conditioning.
    """
    clips = [encoders[name](cond[tokens_of(name)], output_hidden_states=True) for name in CLIPS]
    tail = encoders[T5](cond[tokens_of(T5)])[0] if T5 in encoders else cond[output_of(T5)]
    text = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
    text = torch.cat([pad(text, (0, tail.shape[-1] - text.shape[-1])), tail.to(text.dtype)], dim=-2)
    return {"text": text, "pooled": torch.cat([clip.text_embeds for clip in clips], dim=-1)}


class SD3Codec(PictureCodec):
    """The autoencoder, two CLIPs for tokens and pooled vectors, and T5, without which its tokens are zeros."""

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,77+256,D], "pooled": [B,P]}, float32, or their tokens."""
        if self.pipe.text_encoder_3 is None:
            warn_of_cuts(texts, self.pipe.tokenizer, self.pipe.tokenizer_max_length)
        else:
            warn_of_cuts(texts, self.pipe.tokenizer_3, NUM_TOKENS)
        if self.kept_tokens:
            return self._tokens(texts)
        text, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), None, None, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False,
            max_sequence_length=NUM_TOKENS,
        )  # fmt: skip
        return {"text": text.float(), "pooled": pooled.float()}

    def _tokens(self, texts: Sequence[str]) -> Cond:
        pipe = self.pipe
        tokenizers = dict(zip(CLIPS, (pipe.tokenizer, pipe.tokenizer_2), strict=True))
        found = tokens(texts, tokenizers, {name: pipe.tokenizer_max_length for name in CLIPS})
        if pipe.text_encoder_3 is None:
            width = pipe.transformer.config["joint_attention_dim"]
            return {**found, output_of(T5): torch.zeros(len(texts), NUM_TOKENS, width)}
        return {**found, **self._t5(texts, T5, pipe.tokenizer_3, NUM_TOKENS)}


def config_of(shapes: Shapes, base: Config) -> Config:
    """The values of the transformer's config that vary among the published models."""
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    first = "transformer_blocks.0.attn.norm_q.weight"
    head = shapes[first][0] if first in shapes else base.get("attention_head_dim", 64)
    doubled = (key.split(".")[1] for key in shapes if ".attn2.to_q.weight" in key)
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "num_layers": num_blocks(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": tuple(sorted(map(int, doubled))),
        "qk_norm": "rms_norm" if first in shapes else None,
    }


class SD3(PipelineFamily):
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large, with or without T5."""

    ORIGINAL = OriginalTransformer(
        "SD3Transformer2DModel", config_of, "joint_blocks.", published=lambda _: {"shift": 3.0},
        vae={"scaling_factor": 1.5305, "shift_factor": 0.0609},
        texts={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    )  # fmt: skip
    ENCODERS = ("vae", "text_encoder", "text_encoder_2")
    TEXTS: ClassVar[Texts | None] = Texts(
        {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}, text_of,
        optional=(T5,),
    )  # fmt: skip

    def denoiser_of(self, components: Components) -> SD3Denoiser:
        return SD3Denoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> SD3Codec:
        return SD3Codec(pipe)

    def metadata(self) -> dict[str, str]:
        assert isinstance(self.denoiser, SD3Denoiser)
        config = self.denoiser.transformer.config
        size = "m" if not config["qk_norm"] else "5-medium" if config["dual_attention_layers"] else "5-large"
        return {"modelspec.architecture": f"stable-diffusion-3-{size}/lora", "ss_base_model_version": "sd3"}
