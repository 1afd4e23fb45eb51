"""Flux.1 (Black Forest Labs 2024), through diffusers. B batch, L tokens, D width, h w latent sides."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.models.checkpoints.transformer_configs import Config, Shapes, holds, num_blocks
from lorasmith.models.checkpoints.transformers import CLIP_L, T5_XXL, Convert, OriginalTransformer, State
from lorasmith.models.families.base import PictureCodec, PipelineFamily, warn_of_cuts
from lorasmith.models.families.denoisers import TransformerDenoiser, flow_of, packed, unpacked
from lorasmith.models.sources.components import Components
from lorasmith.models.text_encoders import Texts, output_of, tokens, tokens_of
from lorasmith.types import Cond

NUM_TOKENS = 512  # of T5, all of which are read, padding too
GUIDANCE = 1.0  # that a net that is told it trains with


class FluxDenoiser(TransformerDenoiser):
    """A FluxTransformer2DModel; conditioning is {"text": [B,L,D], "pooled": [B,D]}."""

    WIDTHS = {"text": "joint_attention_dim", "pooled": "pooled_projection_dim"}
    SQUARE = 2

    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[-2:]
        guidance = cond["guidance"][:, 0] if "guidance" in cond else t.new_full(t.shape, GUIDANCE)
        out = self.transformer(
            hidden_states=packed(x_t),
            timestep=t.to(x_t.dtype),
            guidance=guidance if self.transformer.config["guidance_embeds"] else None,
            pooled_projections=cond["pooled"],
            encoder_hidden_states=cond["text"],
            txt_ids=x_t.new_zeros(cond["text"].shape[1], 3),
            img_ids=grid(height // 2, width // 2).to(x_t),
        ).sample
        return unpacked(out, height, width)

    def guided(self, cond: Cond, guidance: float) -> Cond:
        return cond | {"guidance": cond["pooled"].new_full((len(cond["pooled"]), 1), guidance)}


def grid(height: int, width: int) -> Tensor:
    """The places of tokens [height width, 3]: 0, row, column."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(height).float(), torch.arange(width).float())


CLIP, T5 = "text_encoder", "text_encoder_2"


def text_of(encoders: Mapping[str, Any], cond: Cond) -> Cond:
    """CLIP and T5, {"ids", "ids_2": [B,L]} -> {"text": [B,512,D], "pooled": [B,D]}.

    Without T5 its output is in the conditioning.
    """
    text = encoders[T5](cond[tokens_of(T5)])[0] if T5 in encoders else cond[output_of(T5)]
    return {"text": text, "pooled": encoders[CLIP](cond[tokens_of(CLIP)]).pooler_output}


class FluxCodec(PictureCodec):
    """The autoencoder, T5 for the tokens, and CLIP for the pooled vector."""

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,512,D], "pooled": [B,D]}, float32, or their tokens."""
        warn_of_cuts(texts, self.pipe.tokenizer_2, NUM_TOKENS)
        if self.kept_tokens:
            found = tokens(texts, {CLIP: self.pipe.tokenizer}, {CLIP: self.pipe.tokenizer_max_length})
            return {**found, **self._t5(texts, T5, self.pipe.tokenizer_2, NUM_TOKENS)}
        device = self.pipe.text_encoder.device
        text, pooled, _ = self.pipe.encode_prompt(list(texts), None, device=device, max_sequence_length=NUM_TOKENS)
        return {"text": text.float(), "pooled": pooled.float()}


ROWS = 7 * 3072  # of the fused layer in the only width that diffusers' conversion of Flux and Chroma knows
VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
AXES = "axes_dims_rope"


def any_width(state: State, convert: Convert) -> State:
    """Flux's and Chroma's layers linear1 are queries, keys, values and the MLP's input, one below the other."""
    width = state["img_in.weight"].shape[0]
    fused = {key: tensor for key, tensor in state.items() if ".linear1." in key}
    state.update({key: torch.empty(ROWS, 0) for key in fused})
    converted = convert(state)
    for key, tensor in fused.items():
        _, number, _, leaf = key.split(".")
        rows = [width, width, width, len(tensor) - 3 * width]
        for name, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), tensor.split(rows), strict=True):
            converted[f"single_transformer_blocks.{number}.{name}.{leaf}"] = part
    return converted


def _scheduler(shapes: Shapes) -> Config:
    """Dev, which is told the guidance, shifts by size; schnell does not."""
    is_dev = any("guidance_" in key for key in shapes)
    by_size = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    return {"shift": 3.0 if is_dev else 1.0, "use_dynamic_shifting": is_dev, **by_size}


def flux_like(shapes: Shapes) -> dict[str, Any]:
    """Those that Flux.1, Flux.2 and Chroma have."""
    width, channels = shapes["x_embedder.weight"]
    head, out = shapes["transformer_blocks.0.attn.norm_q.weight"][0], shapes["proj_out.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": num_blocks(shapes, "transformer_blocks."),
        "num_single_layers": num_blocks(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
    }


def config_of(shapes: Shapes, base: Config) -> Config:
    """The values of the transformer's config that vary among the published models."""
    return {
        **flux_like(shapes),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": holds(shapes, "guidance_embedder"),
    }


class Flux(PipelineFamily):
    """Flux.1 dev and schnell."""

    ORIGINAL = OriginalTransformer(
        "FluxTransformer2DModel", config_of, "double_blocks.", any_width, AXES, _scheduler, VAE,
        {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    )  # fmt: skip
    ENCODERS = ("vae", "text_encoder", "text_encoder_2")
    TEXTS: ClassVar[Texts | None] = Texts({CLIP: "lora_te1", T5: "lora_te3"}, text_of, optional=(T5,))

    def denoiser_of(self, components: Components) -> FluxDenoiser:
        return FluxDenoiser(components.net("transformer"), flow_of(components.scheduler))

    def codec_of(self, pipe: Any) -> FluxCodec:
        return FluxCodec(pipe)

    def metadata(self) -> dict[str, str]:
        assert isinstance(self.denoiser, FluxDenoiser)
        kind = "dev" if self.denoiser.transformer.config["guidance_embeds"] else "schnell"
        return {"modelspec.architecture": f"flux-1-{kind}/lora", "ss_base_model_version": "flux1"}
