"""Lumina-Image 2.0: one stream of texts and pictures."""

from lorasmith.formats.architectures.architecture import (
    LUMINA2_OR_Z_IMAGE,
    QKV,
    Architecture,
    OnHub,
    numbered,
    one_to_one,
    transformer,
)

LUMINA2_BLOCK = {
    "attention.qkv": QKV,
    **one_to_one(
        {
            "attention.out": "attn.to_out.0", "attention.q_norm": "attn.norm_q", "attention.k_norm": "attn.norm_k",
            "feed_forward.w1": "feed_forward.linear_1", "feed_forward.w2": "feed_forward.linear_2",
            "feed_forward.w3": "feed_forward.linear_3", "attention_norm2": "norm2",
        }
    ),
}  # fmt: skip
MODULATED = one_to_one({"attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"})
LAYERS = {
    **one_to_one(
        {
            "cap_embedder.0": "time_caption_embed.caption_embedder.0",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1", "final_layer.linear": "norm_out.linear_2",
        }
    ),
    **numbered("layers.{}", "layers.{}", LUMINA2_BLOCK | MODULATED),
    **numbered("noise_refiner.{}", "noise_refiner.{}", LUMINA2_BLOCK | MODULATED),
    **numbered("context_refiner.{}", "context_refiner.{}", LUMINA2_BLOCK | one_to_one({"attention_norm1": "norm1"})),
}  # fmt: skip
LUMINA2 = Architecture(
    name="Lumina 2",
    pipelines={"Lumina2Pipeline": "lumina2.Lumina2"},
    lora_signs=r"(layers|refiner)_\d+_attn_|time_caption_embed|feed_forward_linear_\d",
    model_signs=r"(cap_embedder|time_caption_embed)\.",
    widths={LUMINA2_OR_Z_IMAGE: (2304,)},
    transformer="Lumina2Transformer2DModel",
    layers=LAYERS,
    original_names="others",
    published=(
        transformer(
            "Lumina Image 2.0", "Lumina2Pipeline", "Lumina2Transformer2DModel", (LUMINA2_OR_Z_IMAGE,),
            cap_feat_dim=2304,
        ),
    ),
    on_hub=(OnHub("Lumina 2", "Alpha-VLLM/Lumina-Image-2.0", "lumina lumina2 luminaimage luminaimage20"),),
)  # fmt: skip
