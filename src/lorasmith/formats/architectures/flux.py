"""Flux.1: a transformer of double and single blocks."""

from lorasmith.formats.architectures.architecture import (
    ADDED_QKV,
    CLIP_L,
    DOUBLE,
    QKV,
    T5_TEXTS,
    T5_XXL,
    TRANSFORMER,
    Architecture,
    OnHub,
    numbered,
    one_to_one,
    transformer,
)

EMBEDDERS = one_to_one(
    {
        f"{original}.{layer}_layer": f"time_text_embed.{name}_embedder.linear_{number}"
        for original, name in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for number, layer in ((1, "in"), (2, "out"))
    }
)
FLUX_ENDS = one_to_one(
    {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
)  # fmt: skip
FLUX_DOUBLE = {
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADDED_QKV,
    **one_to_one(
        {
            "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
        }
    ),
}  # fmt: skip
FLUX_SINGLE = {
    "linear1": (*QKV, "proj_mlp"),
    **one_to_one(
        {
            "linear2": "proj_out", "modulation.lin": "norm.linear", "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        }
    ),
}  # fmt: skip
FLUX_MLPS = one_to_one(
    {
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
    }
)  # fmt: skip
FLUX_LAYERS = {
    **EMBEDDERS,
    **FLUX_ENDS,
    **numbered("double_blocks.{}", "transformer_blocks.{}", FLUX_DOUBLE | FLUX_MLPS),
    **numbered("single_blocks.{}", "single_transformer_blocks.{}", FLUX_SINGLE),
}
FLUX = Architecture(
    name="Flux",
    pipelines={"FluxPipeline": "flux.Flux"},
    lora_signs=r"single_transformer_blocks|single_blocks|double_blocks",
    model_signs=r"(double_blocks|single_transformer_blocks)\.",
    transformer="FluxTransformer2DModel",
    layers=FLUX_LAYERS,
    published=(
        transformer(
            "FLUX.1", "FluxPipeline", "FluxTransformer2DModel", (T5_TEXTS, DOUBLE, TRANSFORMER),
            {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL}, guidance_embeds=True,
        ),
    ),
    on_hub=(
        OnHub("Flux.1", "black-forest-labs/FLUX.1-dev", "flux flux1 fluxdev flux1dev fluxschnell flux1schnell"),
    ),
    comfyui={"Flux": ("flux-1-dev", "flux1"), "FluxSchnell": ("flux-1-schnell", "flux1")},
)  # fmt: skip
