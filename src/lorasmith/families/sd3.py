"""Stable Diffusion 3 and 3.5 (Esser et al. 2024), through diffusers. B batch, L tokens, D width, h w latent sides."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn, no_grad

from lorasmith.families.components import Components
from lorasmith.families.pipeline import (
    PictureCodec,
    PipelineFamily,
    check_inputs,
    dtype_of,
    flow_of,
    refuse_odd,
    warn_of_cuts,
)
from lorasmith.families.texts import Texts
from lorasmith.noise import Flow
from lorasmith.types import Cond

NUM_TOKENS = 256  # of T5, which come after those of CLIP
NUM_TIMES = 1000.0  # what the net takes the end of time for


@dataclass(frozen=True)
class SD3Denoiser:
    """The transformer and its flow."""

    transformer: Any  # an SD3Transformer2DModel
    process: Flow

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,h,w], t [B], cond {"text": [B,L,D], "pooled": [B,P]} -> eps - x0 [B,C,h,w], float32."""
        config, dtype = self.transformer.config, dtype_of(self.transformer)
        widths = {"text": config["joint_attention_dim"], "pooled": config["pooled_projection_dim"]}
        check_inputs(x_t, cond, channels=config["in_channels"], widths=widths)
        refuse_odd(x_t)
        return self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=t * NUM_TIMES,
            encoder_hidden_states=cond["text"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
        ).sample.float()

    def unread(self) -> Collection[str]:
        """The queries of the text in the last block, which passes no text on."""
        blocks = enumerate(self.transformer.transformer_blocks)
        return {f"transformer.transformer_blocks.{n}.attn.add_q_proj" for n, block in blocks if block.context_pre_only}

    def file_key(self, path: str) -> str:
        return path


class SD3Codec(PictureCodec):
    """The autoencoder, two CLIPs for tokens and pooled vectors, and T5, without which its tokens are zeros."""

    @no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,77+256,D], "pooled": [B,P]}, float32."""
        if self.pipe.text_encoder_3 is None:
            warn_of_cuts(texts, self.pipe.tokenizer, self.pipe.tokenizer_max_length)
        else:
            warn_of_cuts(texts, self.pipe.tokenizer_3, NUM_TOKENS)
        text, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), None, None, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False,
            max_sequence_length=NUM_TOKENS,
        )  # fmt: skip
        return {"text": text.float(), "pooled": pooled.float()}


class SD3(PipelineFamily):
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large, with or without T5."""

    ENCODERS = ("vae", "text_encoder", "text_encoder_2")
    TEXTS: ClassVar[Texts | None] = Texts(
        {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}
    )

    def denoiser_of(self, components: Components) -> SD3Denoiser:
        return SD3Denoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> SD3Codec:
        return SD3Codec(pipe)

    def metadata(self) -> dict[str, str]:
        assert isinstance(self.denoiser, SD3Denoiser)
        config = self.denoiser.transformer.config
        size = "m" if not config["qk_norm"] else "5-medium" if config["dual_attention_layers"] else "5-large"
        return {"modelspec.architecture": f"stable-diffusion-3-{size}/lora", "ss_base_model_version": "sd3"}
