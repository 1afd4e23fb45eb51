"""Stable Diffusion 3 and 3.5: transformers of joint blocks."""

from collections.abc import Collection
from typing import Any

from lorasmith.formats.architectures.architecture import (
    ADDED_QKV,
    CLIP_G,
    QKV,
    SECOND_TEXTS,
    T5_TEXTS,
    T5_XXL,
    TRANSFORMER,
    Architecture,
    OnHub,
    Published,
    clip,
    numbered,
    one_to_one,
    transformer,
)

SD3_BLOCK = {
    "x_block.attn.qkv": QKV,
    "context_block.attn.qkv": ADDED_QKV,
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    **one_to_one(
        {
            "x_block.attn.proj": "attn.to_out.0", "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn2.proj": "attn2.to_out.0", "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k", "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear", "context_block.attn.proj": "attn.to_add_out",
            "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        }
    ),
}  # fmt: skip
LAYERS = {
    **one_to_one(
        {
            "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        }
    ),
    **numbered("joint_blocks.{}", "transformer_blocks.{}", SD3_BLOCK),
}  # fmt: skip
ENCODERS = {
    "text_encoder": clip(768, 12, "CLIPTextModelWithProjection"), "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL,
}  # fmt: skip


def _published(name: str, num_layers: int, looks: Collection[str] = (TRANSFORMER,), **config: Any) -> Published:
    return transformer(
        name, "StableDiffusion3Pipeline", "SD3Transformer2DModel", looks, ENCODERS, num_layers=num_layers,
        num_attention_heads=num_layers, caption_projection_dim=64 * num_layers, **config,
    )  # fmt: skip


SD3 = Architecture(
    name="Stable Diffusion 3",
    pipelines={"StableDiffusion3Pipeline": "sd3.SD3"},
    lora_signs=r"joint_blocks|context_embedder|attn_add_q_proj.*joint",
    weak_lora_signs=r"transformer_blocks_\d+_(attn_add|ff_context|norm1_context)",
    model_signs=r"joint_blocks\.|pos_embed\.pos_embed$",
    widths={TRANSFORMER: (1536, 2432)},
    transformer="SD3Transformer2DModel",
    layers=LAYERS,
    published=(
        _published(
            "SD 3.5 medium", 24, (SECOND_TEXTS, T5_TEXTS, TRANSFORMER), qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)), pos_embed_max_size=384,
        ),
        _published("SD 3 medium", 24, pos_embed_max_size=192),
        _published("SD 3.5 large", 38, qk_norm="rms_norm", pos_embed_max_size=192),
    ),
    on_hub=(
        OnHub(
            "Stable Diffusion 3", "stabilityai/stable-diffusion-3-medium-diffusers", "sd3 stablediffusion3 sd3medium"
        ),
        OnHub(
            "Stable Diffusion 3.5", "stabilityai/stable-diffusion-3.5-medium",
            "sd35 stablediffusion35 sd35medium sd35large",
        ),
    ),
    comfyui={"SD3": ("stable-diffusion-3", "sd3")},
)  # fmt: skip
